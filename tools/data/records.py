"""Reads the records of a data set one after the other, each with the place it has in its file.

jsonl is read here, line by line, so that every fault is told with its line; what `datasets` reads it streams.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkft_fx.errors import DataError

LINES = (".jsonl", ".ndjson")
# What the library datasets has a reader for, by suffix.
TABLES = {".parquet": "parquet", ".csv": "csv"}
# A text file is read in parts of about so many bytes, cut behind a line.
PART = 1 << 20
KNOWN = "a .jsonl, .json, .parquet, .csv or text file, or a folder that datasets saved"


class Part(str):
    """A part of a text file: whether the file begins and ends with it."""

    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class Source:
    """A data set by its file, folder or name on the hub; the ``subset`` and ``split`` of it that are read."""

    name: str
    subset: str | None = None
    split: str = "train"


def located(source: str) -> Source:
    """What ``"owner/name/subset:split"`` and ``"folder:split"`` name; a file of that name comes first."""
    if Path(source).exists():
        return Source(source)
    name, colon, split = source.rpartition(":")
    if not colon:
        name, split = source, "train"
    if Path(name).exists():
        return Source(name, None, split)
    *hub, subset = name.split("/")
    is_file = Path(subset).suffix.lower() in (*LINES, *TABLES, ".json", ".txt")
    if len(hub) == 2 and not is_file and is_hub_name("/".join(hub)):
        return Source("/".join(hub), subset, split)
    return Source(name, None, split)


def records(source: str) -> Iterator[tuple[str, Any]]:
    """Each record of a data set with its place: a dict of fields as a rule, a `Part` of a text file.

    ``source`` is a file, a folder, or the name of a data set on the Hugging Face hub, with an owner (`located`). Raises
    `DataError`, with file and line, for what is missing, empty or broken.
    """
    found = False
    for where, record in _records(source, located(source)):
        found = True
        yield where, record
    if not found:
        raise DataError(f"{source} holds no text; give a file with text to train on")


def _records(source: str, place: Source) -> Iterator[tuple[str, Any]]:
    path = Path(place.name)
    suffix = path.suffix.lower()
    if path.is_dir():
        return _table(source, "row", _folder, path, place.split)
    if not path.exists():
        if is_hub_name(place.name):
            return _table(source, "row", _loaded, place.name, place.split, None, place.subset)
        raise DataError(f"there is no data at {source}; give {KNOWN}")
    if suffix in TABLES:
        return _table(source, "row", _loaded, TABLES[suffix], "train", str(path))
    if suffix == ".json":
        return _array(path)
    return _lines(path) if suffix in LINES else _parts(path)


def is_hub_name(source: str) -> bool:
    """Whether a name that no file has can be one on the hub: an owner and a name, as in ``"tatsu-lab/alpaca"``."""
    owner, _, name = source.partition("/")
    return bool(owner and name) and "/" not in name and not owner.startswith((".", "~")) and not Path(source).suffix


def _table(source: str, unit: str, load: Any, *arguments: Any) -> Iterator[tuple[str, Any]]:
    """The rows of what ``load`` gives; whatever the library meets is raised with the name of the data."""
    try:
        for i, row in enumerate(load(*arguments), start=1):
            yield f"{source} {unit} {i}", row
    except (DataError, ModuleNotFoundError, MemoryError):
        raise
    except Exception as error:  # readers fail in as many ways as there are formats
        reason = str(error.__cause__ or error)
        raise DataError(f"{source} could not be read: {type(error).__name__}: {reason}") from error


def _folder(path: Path, split: str) -> Any:
    import datasets

    if not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return _loaded(str(path), split)
    saved = datasets.load_from_disk(str(path))
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise DataError(f"{path} has no split {split!r}, but {', '.join(saved)}; save one of that name")
    return saved[split]


def _loaded(kind: str, split: str, file: str | None = None, subset: str | None = None) -> Any:
    import datasets

    return datasets.load_dataset(kind, subset, data_files=file, split=split, streaming=True)


def _array(path: Path) -> Iterator[tuple[str, Any]]:
    """The entries of a file that is one JSON array, which is read whole."""
    entries = parse(str(path), _decoded(str(path), _bytes(path)))
    if not isinstance(entries, list):
        raise DataError(
            f"{path} is one JSON value; give a .jsonl file with an object on each line, or an array of them"
        )
    for i, entry in enumerate(entries, start=1):
        yield f"{path} entry {i}", entry


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _raw_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each line of a file with its place, with the break behind it, and without a byte order mark."""
    try:
        with path.open("rb") as file:
            for i, line in enumerate(file, start=1):
                yield f"{path} line {i}", line.removeprefix(b"\xef\xbb\xbf") if i == 1 else line
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    for where, line in _raw_lines(path):
        if text := _decoded(where, line).strip():
            yield where, parse(where, text)


def _parts(path: Path) -> Iterator[tuple[str, Any]]:
    """A text file in parts, with line ends as ``\\n``."""
    text, first, size = "", True, 0
    lines: list[str] = []
    for where, line in _raw_lines(path):
        if size >= PART:
            yield where, _part(lines, first, False)
            lines, size, first = [], 0, False
        lines.append(_decoded(where, line))
        size += len(line)
    text = "".join(lines)
    if text.strip() or not first:
        yield str(path), _part(lines, first, True)


def _part(lines: list[str], is_first: bool, is_last: bool) -> Part:
    part = Part("".join(lines).replace("\r\n", "\n").replace("\r", "\n"))
    part.is_first, part.is_last = is_first, is_last
    return part


def _decoded(where: str, data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text ({error.reason}); convert the file to UTF-8") from error
    if "\0" in text:
        raise DataError(f"{where} holds a NUL byte: this is UTF-16 or not text; convert the file to UTF-8")
    return text


def parse(where: str, text: str) -> Any:
    """A JSON value."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError(f"{where} is JSON nested too deeply to be read; remove the line") from error
    except ValueError as error:  # also integers of more digits than Python converts
        raise DataError(f"{where} is not JSON: {error}") from error

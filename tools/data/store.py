"""Keeps the pieces of a data set on disk as tokens, made once for the same files, tokenizer and options.

The library datasets writes and maps them: they may be larger than memory, and a second run finds them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chunkft_fx.errors import DataError, OptionError
from chunkft_fx.tools.data.formats import Chat, Text, adjusted, check_columns, document, renamed
from chunkft_fx.tools.data.records import located, records
from chunkft_fx.tools.data.tokens import Piece, beginning, pieces, tokenized, written

# Of what is kept; changes when the same input comes out as other pieces.
VERSION = 2
# Documents that are made tokens of together.
TOGETHER = 256


@dataclass(frozen=True)
class Reading:
    """How records become pieces: their field of text, whether prompts are learned, and the tokens of a row.

    ``label_field`` names the label of each document, where these are to be classified. ``columns`` has the names of the
    data for those of formats, ``system`` what conversations begin with that have no such message. With ``last_turn``
    the last turn of each is learned alone. Raises `OptionError` for what does not go together.
    """

    length: int
    field: str = "text"
    train_on_prompts: bool = False
    label_field: str = ""
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    system: str = ""
    last_turn: bool = False

    def __post_init__(self) -> None:
        check_columns(self.columns)
        if self.last_turn and self.train_on_prompts:
            raise OptionError("last-turn and train-on-prompts say what is learned of a conversation; give one of them")


def stored(sources: Sequence[str], tokenizer: Any, reading: Reading) -> Any:
    """A `datasets.Dataset` of the pieces of all sources, in their order.

    Its columns are ``ids`` and ``learned`` (both empty where nothing can be learned), ``cut`` (tokens left off),
    ``lost`` (turns not learned), ``document`` (which record a piece is of), and ``label``. Raises `DataError`.
    """
    import datasets

    kinds = {"ids": datasets.List(datasets.Value("int32")), "learned": datasets.List(datasets.Value("bool"))}
    counts = {name: datasets.Value("int64") for name in ("cut", "lost", "document")}
    raised: list[DataError] = []
    datasets.disable_progress_bars()
    try:
        return datasets.Dataset.from_generator(
            _keeping(raised, lambda: _entries(sources, tokenizer, reading)),
            features=datasets.Features(kinds | counts | {"label": datasets.Value("string")}),
            fingerprint=_fingerprint(sources, tokenizer, reading),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        # the library wraps what is raised in its generator
        if raised:
            raise raised[0] from None
        raise DataError(f"{', '.join(sources)} could not be kept as tokens: {error.__cause__ or error}") from error
    finally:
        datasets.enable_progress_bars()


def _keeping(raised: list[DataError], make: Callable[[], Iterator[Any]]) -> Callable[[], Iterator[Any]]:
    """A generator that remembers the error it ends with."""

    def generate() -> Iterator[Any]:
        try:
            yield from make()
        except DataError as error:
            raised.append(error)
            raise

    return generate


def _entries(sources: Sequence[str], tokenizer: Any, reading: Reading) -> Iterator[dict[str, Any]]:
    begin = beginning(tokenizer)
    number = 0
    for batch in _together((r for source in sources for r in records(source)), TOGETHER):
        labels, texts = [], []
        for where, record in batch:
            labels.append(_label(where, record, reading.label_field) if reading.label_field else "")
            has_template = getattr(tokenizer, "chat_template", None) is not None
            named = renamed(record, reading.columns)
            found = document(where, named, reading.field, has_template and not reading.label_field)
            if reading.label_field and not isinstance(found, Text):
                raise DataError(f'{where} has no text to classify; name its field with --field, now "{reading.field}"')
            if isinstance(found, Chat):
                found = adjusted(found, reading.system, reading.last_turn)
            text = written(where, found, tokenizer, reading.train_on_prompts)
            texts.append(text if text.text.strip() else None)
        made = tokenized([t for t in texts if t is not None], tokenizer)
        for whole, label in zip(texts, labels, strict=True):
            parts: Iterator[Piece] = iter([Piece([], [])])
            if whole is not None:
                parts = pieces(whole, next(made), reading.length, begin)
            for piece in _first(parts) if reading.label_field else parts:
                yield asdict(piece) | {"document": number, "label": label}
            number += 1


def _first(parts: Iterator[Piece]) -> Iterator[Piece]:
    """A document with a label is one piece, cut where it is too long."""
    first, *rest = parts
    yield Piece(first.ids, first.learned, sum(len(piece.ids) for piece in rest), first.lost)


def _label(where: str, record: Any, field: str) -> str:
    value = record.get(field) if isinstance(record, dict) else None
    if isinstance(value, (str, int)):
        return str(int(value) if isinstance(value, bool) else value)
    shown = "no such field" if value is None else type(value).__name__
    raise DataError(
        f'{where}: the label "{field}" must be a name or a number of a class, and is {shown}; --label-field'
    )


def _together(items: Iterator[Any], count: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == count:
            yield batch
            batch = []
    if batch:
        yield batch


def _fingerprint(sources: Sequence[str], tokenizer: Any, reading: Reading) -> str:
    """What the pieces follow from: files by path, size and time of their last change."""
    files = [path for source in sources for path in _files(Path(located(source).name))]
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = [VERSION, list(sources), stats, asdict(reading), special, getattr(tokenizer, "chat_template", None)]
    digest = hashlib.sha256(json.dumps([*parts, type(tokenizer).__name__], default=str).encode())
    digest.update(vocabulary.encode())
    return digest.hexdigest()[:16]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file())
    return [path] if path.exists() else []

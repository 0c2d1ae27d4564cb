"""Finds the checkpoints in a folder, which of them is the newest, and decides which stay."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chunkft_fx.checkpoints.disk.places import (
    REPLACED,
    UNFINISHED,
    hold,
    install,
    let_go,
    remove,
    save_failed,
    sync_files,
)
from chunkft_fx.errors import CheckpointMismatch, SaveFailed

# Of a checkpoint: a folder. Version 1 was this file.
VERSION, READABLE = 2, (2,)
OLD = "checkpoint.pt"
RECORD = "checkpoint.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class Target:
    """A checkpoint that is to be: its folder ``new`` gets the name ``place`` once it is whole.

    Then others go, but the ``keep`` that were saved last (None: all) and that of step ``best``.
    """

    def __init__(self, place: Path, keep: int | None = None, best: int | None = None) -> None:
        self.place, self.keep, self.best = Path(os.path.abspath(place)), keep, best
        self.new = self.place.with_name(self.place.name + UNFINISHED)
        self._held: int | None = None

    def begin(self) -> None:
        """Make its folder, and remove what a killed process left. Raises `SaveFailed`."""
        _refuse_foreign(self.place)
        try:
            self.place.parent.mkdir(parents=True, exist_ok=True)
            clear_unfinished(self.place.parent)
            self.new.mkdir()
            self._held = hold(self.new)
        except FileExistsError as error:
            if not self.new.is_dir():
                raise save_failed(self.place, error) from error
            raise SaveFailed(
                f"{self.place} was not written: another process, or a save of another model, is writing {self.new}; "
                "give each a folder of its own (or remove that one, if nobody is)"
            ) from error
        except OSError as error:
            raise save_failed(self.place, error) from error

    def complete(self) -> None:
        """Have all of it on the disk, give it its name, and remove others."""
        sync_files(self.new)
        install(self.new, self.place)
        self._let_go()
        if self.keep is not None:
            prune(self.place.parent, self.keep, self.best)

    def abandon(self) -> None:
        """Remove what there is of it."""
        shutil.rmtree(self.new, ignore_errors=True)
        self._let_go()

    def _let_go(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            let_go(held)


def _refuse_foreign(place: Path) -> None:
    """Raise `SaveFailed` where a checkpoint would take the place of something else, such as one of Trainer's."""
    is_ours = (place / RECORD).is_file() or not os.path.lexists(place)
    if is_ours or (place.is_dir() and not any(place.iterdir())):
        return
    raise SaveFailed(
        f"{place} was not written: something that save did not make is there already; give another folder, or move it "
        "away"
    )


def name_of(step: int) -> str:
    """The name of the checkpoint behind so many steps."""
    return f"checkpoint-{step}"


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, by their steps."""
    found: dict[int, Path] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name.removesuffix(REPLACED))
        is_better = match is not None and (int(match[1]) not in found or not path.name.endswith(REPLACED))
        if match is not None and is_better and (path / RECORD).is_file():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def newest(folder: Path) -> Path | None:
    """The checkpoint that was saved last, None if there is none."""
    found = checkpoints(folder)
    return max(found, key=lambda path: int(read_record(path)["serial"])) if found else None


def next_serial(folder: Path) -> int:
    """The place of the next checkpoint in the order in which they are saved; those that cannot be read do not count."""
    serials = [0]
    for path in checkpoints(folder):
        try:
            serials.append(int(read_record(path)["serial"]))
        except CheckpointMismatch:
            continue
    return max(serials) + 1


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in folder.iterdir() if folder.is_dir() else ():
        whole = path.name.removesuffix(UNFINISHED).removesuffix(REPLACED)
        is_old = path.name.endswith(REPLACED) and (folder / whole / RECORD).is_file()
        is_left = _NAME.fullmatch(whole) and path.is_dir() and (path.name.endswith(UNFINISHED) or is_old)
        held = hold(path) if is_left else None
        if held is not None:  # else somebody is writing it
            remove(path)
            let_go(held)


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Remove all checkpoints but the ``keep`` that were saved last, and that of step ``best``."""
    whole = [path for path in checkpoints(folder) if _is_readable(path)]
    by_age = sorted(whole, key=lambda path: int(read_record(path)["serial"]))
    for path in by_age[:-keep]:
        if best is None or path.name != name_of(best):
            # at once no checkpoint any more: what is left of a killed removal goes with the next save
            gone = path.with_name(path.name + UNFINISHED)
            with contextlib.suppress(OSError):
                os.replace(path, gone)
                remove(gone)


def _is_readable(path: Path) -> bool:
    try:
        read_record(path)
    except CheckpointMismatch:
        return False
    return True


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write what a checkpoint says of itself, with a checksum."""
    text = _text(record)
    (path / RECORD).write_text(f'{{"sha256":"{hashlib.sha256(text.encode()).hexdigest()}","checkpoint":{text}}}\n')


def read_record(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; raises `CheckpointMismatch` if that is damaged, or of another version."""
    file = path / RECORD
    try:
        whole = json.loads(file.read_bytes())
        record, sha = whole["checkpoint"], whole["sha256"]
        is_whole = hashlib.sha256(_text(record).encode()).hexdigest() == sha
    except OSError as error:
        raise CheckpointMismatch(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointMismatch(f"{file} is damaged: it cannot be read; load an older checkpoint") from error
    if not is_whole or not isinstance(record, dict):
        raise CheckpointMismatch(
            f"{file} is damaged: its checksum is not that of its contents; load an older checkpoint"
        )
    if record.get("version") not in READABLE:
        raise CheckpointMismatch(
            f"{file} is in version {record.get('version')!r} of the format of checkpoints, and this chunkft_fx reads "
            f"version {VERSION}; load it with the chunkft_fx that saved it"
        )
    return record


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":"), sort_keys=True)

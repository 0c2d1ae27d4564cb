"""Reads and writes the runs of a JSON-lines file, and claims runs, so that several processes can share the file.

A line is written whole while the file is locked; what a killed writer left of one is cut off by the next. A claim is a
lock on a file of its own: the kernel gives it up with the process that has it, however that ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What is trained: a row of the table (`rows.Row.text`) in a setting, at one rate, from one seed."""

    setting: str
    row: str
    lr: float
    seed: int
    steps: int

    def __str__(self) -> str:
        return f"{self.setting} {self.row} at {self.lr:g}, seed {self.seed}"

    @property
    def digest(self) -> str:
        """A name for files of this run."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def run_of(record: Record) -> Run:
    """The run that a line is about."""
    return Run(**{f.name: record[f.name] for f in fields(Run)})


def read(path: Path) -> list[Record]:
    """All finished lines, in their order; none if there is no file. ``ValueError`` names a line that is no JSON."""
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")  # behind the last line break is what is being written, or nothing
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is no JSON ({error}); mend it or take it out") from error
    return records


def append(path: Path, record: Record) -> None:
    """Add a line, behind whatever other processes add."""
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _cut_unfinished(file.fileno())
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _cut_unfinished(descriptor: int) -> None:
    """Take away what lies behind the last line break."""
    size = os.fstat(descriptor).st_size
    kept = os.pread(descriptor, size, 0).rfind(b"\n") + 1
    if kept < size:
        os.ftruncate(descriptor, kept)


def latest(records: Iterable[Record]) -> dict[Run, Record]:
    """The last line of each run."""
    return {run_of(record): record for record in records}


def claim(folder: Path, run: Run) -> int | None:
    """A file descriptor that holds the run for this process and those that inherit it; None if another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / run.digest, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process is inside with the same path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

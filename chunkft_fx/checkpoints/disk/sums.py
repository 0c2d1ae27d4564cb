"""Computes checksums of a checkpoint's files block by block, and finds the file and the tensor that was damaged.

CRC-32 finds every flipped bit and every run of up to 32 of them, and keeps up with disks, which SHA-256 does not where
a processor has no instructions for it. It is no protection from somebody who wants to change a file.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from chunkft_fx.checkpoints.disk.tensor_file import places
from chunkft_fx.errors import CheckpointMismatch

# Bytes that have a sum of their own, at most.
BLOCK_NBYTES = 16 * 2**20
TENSORS = ".safetensors"
HEADER = "header"


class Sum(NamedTuple):
    """The checksum of a block of a file; ``label`` is the tensor that it belongs to, empty where a file has none."""

    label: str
    start: int
    nbytes: int
    crc: int


def file_sums(path: Path) -> list[Sum]:
    """The sums of a file that is there, in order."""
    with open(path, "rb", buffering=0) as file:
        return [Sum(*block, _crc(file.fileno(), block[1], block[2])) for block in _blocks(path)]


def check_file(path: Path, sums: Sequence[Sequence[object]]) -> None:
    """Raise `CheckpointMismatch` unless a file is what it was when it got these sums, in any order."""
    found = sorted((Sum(*s) for s in sums), key=lambda s: s.start)  # type: ignore[arg-type]
    try:
        size = path.stat().st_size
        with open(path, "rb", buffering=0) as file:
            for block in found:
                if block.start + block.nbytes > size:
                    break
                if _crc(file.fileno(), block.start, block.nbytes) != block.crc:
                    raise CheckpointMismatch(
                        f"{path} is damaged{_where(block.label)}: its checksum is not that of its contents; load an "
                        "older checkpoint, or a copy of this one"
                    )
    except OSError as error:
        raise CheckpointMismatch(f"{path} cannot be read: {error.strerror}") from error
    expected = sum(block.nbytes for block in found)
    if size != expected:
        raise CheckpointMismatch(f"{path} is damaged: it has {size} bytes, and {expected} were written")


def _where(label: str) -> str:
    return f" in tensor {label!r}" if label and label != HEADER else " in its header" if label else ""


def _blocks(path: Path) -> Iterable[tuple[str, int, int]]:
    """The label, start and bytes of each block of a file."""
    size = path.stat().st_size
    parts = [("", 0, size)]
    if path.name.endswith(TENSORS):
        held = sorted((place.start, place.nbytes, key) for key, (_, place) in places(path).items())
        begin = held[0][0] if held else size
        parts = [(HEADER, 0, begin), *((key, start, nbytes) for start, nbytes, key in held)]
    for label, start, nbytes in parts:
        for at in range(0, nbytes, BLOCK_NBYTES):
            yield label, start + at, min(BLOCK_NBYTES, nbytes - at)


def _crc(descriptor: int, start: int, nbytes: int) -> int:
    found = 0
    while nbytes and (data := os.pread(descriptor, min(nbytes, BLOCK_NBYTES), start)):
        found = zlib.crc32(data, found)
        start, nbytes = start + len(data), nbytes - len(data)
    return found

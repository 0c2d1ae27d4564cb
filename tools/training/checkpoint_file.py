"""Writes and reads a checkpoint file: ``torch.save`` with a checksum behind it, replaced as a whole or not at all.

The SHA-256 of all bytes before stands at the end, behind a mark; ``torch.load`` does not mind it. Nothing is unpickled
before the sum is right, and then only tensors and plain values.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import torch

from chunkft_fx.bytes import format_bytes
from chunkft_fx.errors import CheckpointMismatch, SaveFailed

MARK = b"chunkft-sha256:"
TRAILER = len(MARK) + hashlib.sha256().digest_size
UNFINISHED = ".unfinished"
PIECE = 1 << 20


class _Hashed:
    """What ``torch.save`` writes to: the file, and the sum of all that went into it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sum = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sum.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write(path: Path, state: dict[str, Any]) -> None:
    """Put a checkpoint where an earlier one may be, which stays until this one is whole and on the disk.

    Raises `SaveFailed` when it cannot be written; nothing of it is then left, and an earlier one is as it was.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with open(unfinished, "wb") as file:
            hashed = _Hashed(file)
            torch.save(state, hashed)  # type: ignore[arg-type]  # it asks for no more than these methods
            file.write(MARK + hashed.sum.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(path.parent)
    except OSError as error:
        _remove(unfinished)  # before it is asked how much space there is
        raise save_failed(path, error) from error
    except BaseException:
        _remove(unfinished)
        raise


def read(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU; raises `CheckpointMismatch` for a file that is not whole, or is none."""
    try:
        _check_sum(path)
    except OSError as error:
        raise CheckpointMismatch(f"{path} cannot be read: {error.strerror}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is in a file that somebody else wrote fails in as many ways as there are formats
        raise CheckpointMismatch(
            f"{path} holds something other than tensors and plain values, and is not loaded: no run of chunkft wrote it"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointMismatch(f"{path} holds a {type(state).__name__}, not the checkpoint of a run")
    return state


def _check_sum(path: Path) -> None:
    with open(path, "rb") as file:
        rest = max(os.fstat(file.fileno()).st_size - TRAILER, 0)
        found = hashlib.sha256()
        while rest and (piece := file.read(min(rest, PIECE))):
            found.update(piece)
            rest -= len(piece)
        trailer = file.read()
    if not trailer.startswith(MARK) or len(trailer) != TRAILER:
        raise CheckpointMismatch(f"{path} is cut short, or not a checkpoint: it does not end in a checksum")
    if trailer[len(MARK) :] != found.digest():
        raise CheckpointMismatch(
            f"{path} is damaged: its checksum is not that of its contents; resume from a copy of it, or begin anew"
        )


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the disk know which files a folder holds."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_failed(path: Path, error: Exception) -> SaveFailed:
    """Why something was not written, a full disk with its name."""
    number = getattr(error, "errno", None)
    if number is None and (code := re.search(r"os error (\d+)", str(error))):
        number = int(code[1])  # as Rust's libraries have it in their message
    if number in (errno.ENOSPC, errno.EDQUOT):
        disk = _mount_point(path)
        free = format_bytes(shutil.disk_usage(disk).free)
        return SaveFailed(
            f"the disk mounted at {disk} is full ({free} free): {path} was not written, and what was there before is "
            "as it was; free more space and resume"
        )
    reason = os.strerror(number) if number is not None else str(error)
    return SaveFailed(f"{path} was not written, and what was there before is as it was: {reason}")


def _mount_point(path: Path) -> Path:
    place = path.resolve()
    while not place.exists() or not os.path.ismount(place):
        if place == place.parent:
            break
        place = place.parent
    return place

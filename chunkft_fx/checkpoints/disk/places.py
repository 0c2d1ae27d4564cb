"""Writes folders so that none is ever there by half, and says what an error of the disk means."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from pathlib import Path

from chunkft_fx.bytes import format_bytes
from chunkft_fx.errors import SaveFailed

UNFINISHED = ".unfinished"
# What an older folder of the same name is called while a new one takes its place.
REPLACED = ".replaced"


def sync_files(folder: Path) -> None:
    """Have the disk hold all that is in a new folder."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Have the disk hold a file, or know which files a folder holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def install(new: Path, place: Path) -> None:
    """Give a whole folder its name; one that has it already stays until then, at the worst under another name."""
    old = place.with_name(place.name + REPLACED)
    if os.path.lexists(place):
        remove(old)
        os.replace(place, old)
    os.replace(new, place)
    sync(place.parent)
    remove(old)


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, as far as that can be; of a link the link alone."""
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def hold(folder: Path) -> int | None:
    """A descriptor that holds a folder against others until it is closed, or its process dies; None if one is held.

    Nothing is held on a disk that has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass
    return descriptor


def let_go(descriptor: int) -> None:
    """Hold a folder no longer, also where a process that was forked meanwhile has the descriptor, too."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def os_failure(path: Path, error: BaseException) -> SaveFailed | None:
    """The error of this library for one of the system; None for any other error."""
    is_systems = isinstance(error, OSError) or "os error" in str(error)
    return save_failed(path, error) if is_systems and not isinstance(error, SaveFailed) else None


def save_failed(path: Path, error: BaseException) -> SaveFailed:
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

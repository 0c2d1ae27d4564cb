"""Holds the folder that a run writes to for one process, and saves models so that none is ever there by half."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from chunkft_fx.checkpoints.disk.folders import OLD, clear_unfinished
from chunkft_fx.checkpoints.disk.places import UNFINISHED, save_failed, sync, sync_files
from chunkft_fx.errors import FolderInUse, OptionError, TrainingDiverged

LOCK = ".chunkft.lock"
MODEL = f"model{UNFINISHED}"
# The weights of a model, whole or in shards, and which of the shards holds what.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
# What makes a folder a model: gone first and back last.
_CONFIG = "config.json"


@contextlib.contextmanager
def claimed(out: Path, model: str) -> Iterator[None]:
    """Make the folder, hold it until the end (also one by SIGKILL), and remove what a killed run left half-written.

    Raises `OptionError` when it cannot be made or is the folder of the ``model`` that is to be trained, `FolderInUse`
    when another process holds it.
    """
    _make(out)
    if Path(model).is_dir() and out.samefile(model):
        raise OptionError(f"--out {out} is the folder of the model itself, which saving would replace; give another")
    try:
        lock = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OptionError(f"--out {out} cannot be written to: {error.strerror}") from error
    try:
        _hold(lock, out)
        shutil.rmtree(out / MODEL, ignore_errors=True)
        (out / f"{OLD}{UNFINISHED}").unlink(missing_ok=True)
        clear_unfinished(out)
        yield
    finally:
        os.close(lock)


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OptionError(f"--out {out} is, or lies in, a file; give the path of a folder") from error
    except OSError as error:
        raise OptionError(f"--out {out} cannot be made: {error.strerror}") from error


def _hold(lock: int, out: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(lock, 20).decode(errors="replace").strip()
        raise FolderInUse(f"process {holder} is writing to --out {out}; wait for it, or give another folder") from error
    except OSError as error:
        raise OptionError(f"--out {out} is on a disk that cannot be locked: {error.strerror}") from error
    with contextlib.suppress(OSError):  # a full disk: the number is for the message above only
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)


@torch.no_grad()
def require_finite(model: nn.Module, kept: str) -> None:
    """Raise `TrainingDiverged` if a weight is not a finite number; ``kept`` says what is there instead of it."""
    for name, p in model.named_parameters():
        # the largest absolute value takes no memory, and is not a number if any is not
        if p.numel() and not torch.linalg.vector_norm(p, float("inf")).isfinite():
            raise TrainingDiverged(f"{name} holds values that are not finite numbers, and is not saved; {kept}")


def save_model(out: Path, model: Any, tokenizer: Any, notes: Mapping[str, str] = MappingProxyType({})) -> None:
    """Save both with ``save_pretrained``, beside what is in the folder, and replace that once all is on the disk.

    ``notes`` are files of text that belong to this model.

    Raises `SaveFailed`: what was in the folder is then as it was. Killed in between, the folder holds no model.
    """
    require_finite(model, "lower --lr, or check the data")
    new = out / MODEL
    shutil.rmtree(new, ignore_errors=True)
    try:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        for name, text in notes.items():
            (new / name).write_text(text)
        sync_files(new)
        _install(new, out)
    except Exception as error:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError) or "os error" in str(error):
            raise save_failed(out, error) from error
        raise
    shutil.rmtree(new, ignore_errors=True)


def _install(new: Path, out: Path) -> None:
    names = sorted((file.name for file in new.iterdir()), key=lambda name: name == _CONFIG)
    (out / _CONFIG).unlink(missing_ok=True)
    for old in out.iterdir():
        if _WEIGHTS.fullmatch(old.name) and old.name not in names:
            old.unlink()  # shards of a model that was cut into another number
    for name in names:
        # a tokenizer may save folders of its own: moved over an old one, they would be refused
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        os.replace(new / name, out / name)
    sync(out)

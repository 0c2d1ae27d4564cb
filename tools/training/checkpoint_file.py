"""Reads a checkpoint of version 1, a file: ``torch.save`` with a checksum behind it.

The SHA-256 of all bytes before stands at the end, behind a mark; ``torch.load`` does not mind it. Nothing is unpickled
before the sum is right, and then only tensors and plain values.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from chunkft_fx.checkpoints.load import SavedTraining
from chunkft_fx.errors import CheckpointMismatch

MARK = b"chunkft-sha256:"
TRAILER = len(MARK) + hashlib.sha256().digest_size
PIECE = 1 << 20
VERSION = 1
_ENTRIES = ("step", "options", "model", "optimizer", "scheduler", "batches", "random", "random_cuda")


def read_old(path: Path) -> SavedTraining:
    """The run in a file; raises `CheckpointMismatch` for one that is not whole, or of another version."""
    state = read(path)
    if state.get("version") != VERSION:
        raise CheckpointMismatch(
            f"{path} is in version {state.get('version')!r} of the format of checkpoints, and this chunkft reads files "
            f"of version {VERSION} and folders; resume with the chunkft that wrote it, or begin a new run"
        )
    missing = [name for name in _ENTRIES if name not in state]
    if missing:
        raise CheckpointMismatch(f"{path} has no {', '.join(missing)}: no run of chunkft wrote it")
    random = {"torch": state["random"], "cuda": state["random_cuda"]}
    extra = {"options": state["options"], "batches": state["batches"]}
    return SavedTraining(path, state["step"], state["optimizer"], state["scheduler"], random, extra, state["model"])


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

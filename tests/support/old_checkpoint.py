"""Writes a checkpoint of version 1, a file, as releases before folders did; `old_state` makes one of a folder's."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from chunkft_fx.checkpoints.load import read
from chunkft_fx.checkpoints.weights import saved_weights
from chunkft_fx.tools.training.checkpoint_file import MARK


def write_old(path: Path, state: Any) -> None:
    """``torch.save`` with a checksum behind it."""
    file = io.BytesIO()
    torch.save(state, file)
    path.write_bytes(file.getvalue() + MARK + hashlib.sha256(file.getvalue()).digest())


def old_state(checkpoint: Path, model: torch.nn.Module) -> dict[str, Any]:
    """What a run wrote in version 1 where it writes this checkpoint now."""
    found = read(checkpoint)
    assert found.random is not None
    return {
        "version": 1,
        "step": found.step,
        "options": found.extra["options"],
        "model": dict(saved_weights(model, checkpoint)),
        "optimizer": found.optimizer,
        "scheduler": found.scheduler,
        "batches": found.extra["batches"],
        "random": found.random["torch"],
        "random_cuda": [],
    }

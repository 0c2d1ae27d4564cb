"""Takes the states of all random number generators that a training may use, and puts them back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chunkft_fx.errors import CheckpointMismatch


def random_states() -> dict[str, Any]:
    """Plain data and tensors: the states of torch on the CPU and each GPU, of Python and of numpy."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "python": random.getstate(),
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def check_random(states: Mapping[str, Any], where: str) -> None:
    """Raise `CheckpointMismatch` unless these can be put back."""
    ours, theirs = torch.get_rng_state(), states.get("torch")
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        raise CheckpointMismatch(f"{where} has no state of torch's random numbers: no run of chunkft wrote it")


def restore_random(states: Mapping[str, Any]) -> None:
    """Go on with these states, as far as there are as many GPUs."""
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])
    if "python" in states:
        random.setstate(states["python"])
        kind, keys, *rest = states["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))

"""Copies the random state of a step before its forward, so that running it again draws the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def taken(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The states of the host's generator, and of that of the device that a model runs on, if it is another."""
    return torch.random.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def restored(states: tuple[Tensor, Tensor | None] | None, device: torch.device) -> Iterator[None]:
    """Run with earlier random states of a device, as `taken` gave them, and put the present ones back afterwards."""
    if states is None:
        yield
        return
    now = taken(device)
    _put(states, device)
    try:
        yield
    finally:
        _put(now, device)


def _put(states: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    on_host, on_device = states
    torch.random.set_rng_state(on_host)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device, device)

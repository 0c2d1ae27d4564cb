"""Saving and loading take no second copy of the states."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import chunkft_fx

MIB = 2**20


def anonymous_nbytes() -> int:
    """Memory that this process alone holds: files that it has mapped do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def growth(call: Callable[[], object]) -> int:
    """The most that this process holds during a call, above what it held before."""
    gc.collect()
    before, most, ended = anonymous_nbytes(), [0], threading.Event()

    def look() -> None:
        while not ended.wait(0.001):
            most[0] = max(most[0], anonymous_nbytes())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        call()
    finally:
        ended.set()
        looking.join()
    return max(most[0], anonymous_nbytes()) - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own count")
def test_states_are_saved_and_loaded_without_a_copy_of_all(tmp_path: Path) -> None:
    layers = nn.Sequential(*[nn.Linear(1024, 2048, bias=False) for _ in range(12)]).bfloat16()
    model = chunkft_fx.compile(layers, "1GB", chunks=3, interval=1, order="ascending", backend="eager")
    optimizer = chunkft_fx.AdamW(model, master="remainder")
    for _ in range(3):
        for s in model.active_slices():
            s.grad = torch.ones_like(s.weight(), dtype=torch.float32)
        optimizer.step()
    states = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    assert states == 12 * 1024 * 2048 * 10
    assert growth(lambda: chunkft_fx.save(tmp_path, model, optimizer, 3)) < 48 * MIB
    # of a parameter of 2 million elements its master at a time; old states go before new ones come
    assert growth(lambda: chunkft_fx.load(tmp_path, model, optimizer)) < 64 * MIB
    held: list[object] = []  # what is measured so would show: a state dict has all masters, 96 MiB
    assert growth(lambda: held.append(optimizer.state_dict())) > 64 * MIB

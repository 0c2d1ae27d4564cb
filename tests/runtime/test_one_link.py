"""Weights, saved values and states come to the device over one link: right whenever its copies happen."""

from __future__ import annotations

import copy
import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import chunkft_fx
from chunkft_fx import passes
from chunkft_fx.copies import engines
from chunkft_fx.copies.link import CudaLink, Link
from chunkft_fx.copies.states.ring import CopyingRing
from chunkft_fx.copies.tier import HostTier
from chunkft_fx.graph import ops
from chunkft_fx.optim.states import staging
from chunkft_fx.passes import OffloadSaved
from chunkft_fx.plan import pieces
from tests.runtime.test_full_coverage import Tied, assert_equal, batch
from tests.support.forced_streaming import streaming
from tests.support.stream_machine import CPU, Machine, machine
from tests.support.waiting import waiting_in_host

__all__ = ["machine"]


class Deep(Tied):
    """So many layers that values are worth a way to host memory and back."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6, dtype=torch.float64) for _ in range(7))


def ring(incoming: Link, depth: int, nbytes: int) -> CopyingRing:
    """That of a GPU: what comes to the device comes over the link of all."""
    assert isinstance(incoming, CudaLink)
    return CopyingRing(incoming, CudaLink(CPU), HostTier(CPU), depth, nbytes)


@pytest.mark.parametrize("kind", ["backward", "step", "step, gradients in host memory"])
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_one_link_brings_all_in_turn(
    machine: Machine, seed: int, micro: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers of the rings are used over and over, values of several micro-batches come and go."""
    machine.chance = random.Random(seed) if seed else None
    monkeypatch.setattr(pieces, "LARGEST_NBYTES", 400)
    monkeypatch.setattr(pieces, "MOST_BUFFERS", 3 + seed)
    monkeypatch.setattr(engines, "open_link", CudaLink)
    monkeypatch.setattr(engines, "make_ring", ring)
    monkeypatch.setattr(staging, "make_ring", ring)
    monkeypatch.setattr(passes, "OffloadSaved", lambda _below, device: OffloadSaved(99, device, 1))
    torch.manual_seed(seed)
    model = Deep()
    plain = copy.deepcopy(model)
    update: Any = kind.split(",")[0]
    waiting = waiting_in_host if kind.endswith("memory") else nullcontext
    with streaming("all"), waiting():
        ours: Any = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager")
        optimizers = [chunkft_fx.AdamW(ours, lr=1e-2, update=update), torch.optim.AdamW(plain.parameters(), lr=1e-2)]
        for step in range(4):
            given = [batch(10 * step + i) for i in range(micro)]
            torch.stack(ours.accumulate([(b,) for b in given])).sum().backward()
            torch.stack([plain(b) for b in given]).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert isinstance(optimizers[0], chunkft_fx.AdamW)
        optimizers[0].state_dict()  # waits for what goes out
    targets = [n.target for n in ours.program.graph.nodes]
    assert ops.offload in targets
    assert ours._training.engines.saved.pool.nbytes > 0
    assert_equal(ours, plain, 1e-9)

"""The weight ring on its own: fetches at any timing, buffers used too early, fetches that are abandoned."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from chunkft_fx.copies.link import CudaLink, Link
from chunkft_fx.copies.tier import HostTier
from chunkft_fx.copies.weight_ring import Ring, ring_buffer_nbytes
from chunkft_fx.graph.layout import stage_nbytes
from tests.support.stream_machine import CPU, Machine, machine

__all__ = ["machine"]

USES = [[torch.randn(5, 3), torch.randn(7, dtype=torch.float64)], [torch.randn(4, 6).t()], [torch.randn(40)]]


def ring(link: Link, depth: int) -> Ring:
    return Ring(link, HostTier(CPU), depth, ring_buffer_nbytes(USES))


def swept(fetches: Ring, ahead: int, waits: bool = True) -> list[Tensor]:
    """What uses read whose fetches run ``ahead`` of them."""
    uses = [USES[i % len(USES)] for i in range(12)]
    under_way: list[list[Tensor]] = []
    read: list[Tensor] = []
    for i in range(len(uses) + ahead):
        if i < len(uses):
            under_way.append(fetches.fetch(uses[i], i % fetches.depth))
        if i >= ahead:
            if waits:
                fetches.wait((i - ahead) % fetches.depth)
            read += [t.clone() for t in under_way[i - ahead]]
    return read


WANTED = [t for i in range(12) for t in USES[i % len(USES)]]


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_weights_arrive_at_any_timing(machine: Machine, depth: int, seed: int) -> None:
    machine.chance = random.Random(seed) if seed else None
    for link in (Link(CPU), CudaLink(CPU)):
        read = swept(ring(link, depth), depth - 1)
        for a, b in zip(read, WANTED, strict=True):
            assert torch.equal(a, b)


def test_a_weight_that_is_not_waited_for_is_noticed(machine: Machine) -> None:
    assert not all(map(torch.equal, swept(ring(CudaLink(CPU), 2), 1, waits=False), WANTED))


@pytest.mark.parametrize("kind", [Link, CudaLink])
def test_a_buffer_that_is_used_again_too_early_is_noticed(machine: Machine, kind: type[Link]) -> None:
    assert not all(map(torch.equal, swept(ring(kind(CPU), 2), 2), WANTED))


def test_copies_have_the_shapes_and_strides_of_the_weights_and_lie_apart() -> None:
    fetches = ring(Link(CPU), 2)
    copies = fetches.fetch([t for use in USES[:1] for t in use], 1)
    for c, t in zip(copies, USES[0], strict=True):
        assert (c.shape, c.stride(), c.dtype) == (t.shape, t.stride(), t.dtype)
    assert copies[1].data_ptr() - copies[0].data_ptr() == stage_nbytes(USES[0][0].nbytes)


def test_a_fetch_is_behind_the_work_that_updates_its_weight(machine: Machine) -> None:
    fetches, weight = ring(CudaLink(CPU), 2), torch.zeros(40)
    machine.compute_late(lambda: weight.fill_(1))
    copies = fetches.fetch([weight], 0)
    fetches.link.synchronize()
    assert bool(copies[0].eq(1).all())


def test_an_abandoned_fetch_is_ended_before_its_buffer_goes_to_another(machine: Machine) -> None:
    fetches = ring(CudaLink(CPU), 2)
    copies = fetches.fetch(USES[2], 0)
    fetches.abandon()
    assert torch.equal(copies[0], USES[2][0])
    copies[0].zero_()  # the memory is another's
    assert not machine.work
    for a, b in zip(swept(fetches, 1), WANTED, strict=True):  # the same ring goes on
        assert torch.equal(a, b)

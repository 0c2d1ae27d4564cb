"""Saved values on their own: buffers that are used again, values that come back whole at any timing of the copies."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chunkft_fx.copies.link import CudaLink, Link
from chunkft_fx.copies.saved_values import BufferPool, KeptCopy, SavedValues, buffer_nbytes
from chunkft_fx.copies.tier import HostTier
from tests.support.stream_machine import CPU, Machine, machine

__all__ = ["machine"]


@given(st.integers(0, 10**10))
def test_buffers_waste_an_eighth_at_most(nbytes: int) -> None:
    size = buffer_nbytes(nbytes)
    assert nbytes <= size <= max(nbytes * 9 / 8, buffer_nbytes(0))
    assert size % 16 == 0  # every dtype can be laid over it
    assert buffer_nbytes(size) == size


def test_a_pool_takes_the_smallest_free_buffer_that_is_large_enough() -> None:
    pool = BufferPool(HostTier(torch.device("cpu")))
    small, large = pool.take(4096), pool.take(16384)
    held = pool.nbytes
    pool.give_back(large)
    pool.give_back(small)
    assert pool.take(4000) is small
    assert pool.take(4000) is large
    assert pool.nbytes == held
    pool.take(4000)
    assert pool.nbytes == held + 4096


def test_values_come_back_with_their_dtype_and_strides() -> None:
    carrier = SavedValues(Link(CPU), Link(CPU), HostTier(torch.device("cpu")))
    values = [torch.randn(3, 5).t(), torch.randn(2, 3, 4).to(torch.bfloat16), torch.arange(7), torch.tensor(True)]
    host = carrier.offload(values, 0)
    kept = [v.clone() for v in values]
    carrier.release(0)
    for value in values:
        value.zero_()
    copies = carrier.fetch(host, 1)
    carrier.wait(1)
    for a, b, host_copy in zip(copies, kept, host, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
        assert a.dtype == b.dtype
        assert a.data_ptr() != host_copy.tensor.data_ptr()


def steps(carrier: SavedValues, seed: int) -> list[Tensor]:
    """What comes back in steps that offload, release, drop, fetch and wait in any order that programs have."""
    rng = random.Random(seed)
    back: list[Tensor] = []
    for step in range(6):
        kept: list[list[KeptCopy]] = []
        for number in range(4):
            values = [torch.full((300,), 10.0 * step + number), torch.full((7, 3), -1.0 - number)]
            kept.append(carrier.offload(values, number))
            for _ in range(rng.randint(1, 2)):  # values of one offload may be released at several places
                carrier.release(number)
            for value in values:
                value.fill_(float("nan"))  # the memory is another's
        if rng.random() < 0.2:
            continue  # no backward: the buffers go back to the pool
        for number in reversed(range(4)):
            copies = carrier.fetch(kept.pop(), number)  # the pool has the buffers again
            if rng.random() < 0.5:
                carrier.offload([torch.zeros(300)], 9)  # takes a buffer that was given back just now
            carrier.wait(number)
            back += [c.clone() for c in copies]
    return back


def carriers(link: type[CudaLink] = CudaLink) -> tuple[SavedValues, SavedValues]:
    """One over streams of the machine, one that copies at once."""
    host = HostTier(CPU)
    return SavedValues(link(CPU), link(CPU), host), SavedValues(Link(CPU), Link(CPU), host)


@pytest.mark.parametrize("seed", range(20))
def test_no_order_of_the_copies_changes_a_value(machine: Machine, seed: int) -> None:
    machine.chance = random.Random(seed) if seed % 3 else None
    streamed, plain = carriers()
    for a, b in zip(steps(streamed, seed), steps(plain, seed), strict=True):
        assert torch.equal(a, b)
    assert streamed.pool.nbytes == plain.pool.nbytes


class FollowingNobody(CudaLink):
    """A link that takes no notice of what other links have begun."""

    def follow_mark(self, mark: object) -> None:
        pass


class NeverAwaited(CudaLink):
    """A link whose copies nobody waits for."""

    def wait(self, mark: object) -> None:
        pass


@pytest.mark.parametrize("broken", [FollowingNobody, NeverAwaited])
def test_copies_that_overtake_others_or_are_not_awaited_are_noticed(machine: Machine, broken: type[CudaLink]) -> None:
    def is_right(seed: int) -> bool:
        machine.chance = random.Random(seed)
        streamed, plain = carriers(broken)
        return all(map(torch.equal, steps(streamed, seed), steps(plain, seed)))

    assert not all(is_right(seed) for seed in range(20))


def test_an_offload_is_behind_the_work_that_makes_its_values(machine: Machine) -> None:
    carrier, value = SavedValues(CudaLink(CPU), CudaLink(CPU), HostTier(CPU)), torch.zeros(100)
    machine.compute_late(lambda: value.fill_(1))
    kept = carrier.offload([value], 0)
    carrier._out.synchronize()
    assert bool(kept[0].tensor.eq(1).all())


def test_a_fetch_is_behind_the_way_out_of_its_values(machine: Machine) -> None:
    """Also where the device has not given up their memory yet."""
    carrier = SavedValues(CudaLink(CPU), CudaLink(CPU), HostTier(CPU))
    copies = carrier.fetch(carrier.offload([torch.ones(100)], 0), 1)
    carrier.wait(1)
    machine.finish(machine.compute.last)
    assert bool(copies[0].eq(1).all())


def test_a_fetch_is_behind_the_work_that_still_uses_the_memory_of_its_copies(machine: Machine) -> None:
    carrier = SavedValues(CudaLink(CPU), CudaLink(CPU), HostTier(CPU))
    kept = carrier.offload([torch.ones(100)], 0)
    still_used: list[bool] = []
    machine.compute_late(lambda: still_used.append(True))
    carrier.fetch(kept, 1)
    carrier._in.synchronize()
    assert still_used


def test_fetched_copies_are_held_until_they_are_waited_for(machine: Machine) -> None:
    """Else their memory would go to others while bytes are on their way into it."""
    carrier = SavedValues(CudaLink(CPU), CudaLink(CPU), HostTier(CPU))
    copies = carrier.fetch(carrier.offload([torch.ones(100)], 0), 1)
    gone = weakref.ref(copies[0])
    copies.clear()
    carrier._in.synchronize()  # so that the machine itself holds nothing
    gc.collect()
    assert gone() is not None
    carrier.wait(1)
    gc.collect()
    assert gone() is None


def test_an_abandoned_step_has_ended_its_copies_and_gives_its_buffers_back(machine: Machine) -> None:
    carrier = SavedValues(CudaLink(CPU), CudaLink(CPU), HostTier(CPU))
    kept = carrier.offload([torch.ones(100)], 0)
    carrier.release(0)
    copies = carrier.fetch(kept, 1)
    kept += carrier.offload([torch.ones(100)], 2)
    assert any(w.action is not None for w in machine.work)
    carrier.abandon()
    assert not machine.work
    assert bool(copies[0].eq(1).all())
    assert bool(kept[1].tensor.eq(1).all())
    kept.clear()
    assert carrier.pool.free_nbytes == carrier.pool.nbytes > 0
    for a in steps(carrier, 0):  # the same carrier goes on
        assert not a.isnan().any()

"""The stage's copies: neighbours in host memory become one, but only within one allocation."""

from __future__ import annotations

import torch
from torch import Tensor

from chunkft_fx.copies.states.batches import batches_of, stage_places
from chunkft_fx.graph.layout import stage_nbytes
from tests.support.stream_machine import Machine, copied_stage, machine

__all__ = ["machine"]

NBYTES = 4096


def neighbours() -> tuple[Tensor, Tensor]:
    """Two tensors, one behind the other in memory, that do not share an allocation as torch sees it."""
    memory = bytearray(2 * NBYTES)
    halves = [torch.frombuffer(memory, dtype=torch.float32, count=NBYTES // 4, offset=i * NBYTES) for i in (0, 1)]
    first, second = halves
    assert first.data_ptr() + NBYTES == second.data_ptr()
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert stage_nbytes(NBYTES) == NBYTES  # so that they are neighbours on the stage, too
    return first, second


def copies(host: list[Tensor]) -> list[int]:
    """The bytes of each copy."""
    places, nbytes = stage_places(host)
    batches = batches_of(torch.zeros(nbytes, dtype=torch.uint8), host, places)
    return [copy.host.numel() for batch in batches for copy in batch.copies]


def test_neighbours_in_one_allocation_are_one_copy() -> None:
    whole = torch.zeros(2 * NBYTES, dtype=torch.uint8)
    assert copies([whole[:NBYTES], whole[NBYTES:]]) == [2 * NBYTES]


def test_neighbours_in_two_allocations_are_two_copies() -> None:
    assert copies(list(neighbours())) == [NBYTES, NBYTES]


def test_the_stage_carries_neighbours_of_two_allocations_in_and_back(machine: Machine) -> None:
    first, second = neighbours()
    first.fill_(1)
    second.fill_(2)
    stage = copied_stage(0)
    stage.announce([first, second])
    staged = stage.tensors()
    assert [float(s.sum()) for s in staged] == [NBYTES / 4, NBYTES / 2]
    for s in staged:
        s.mul_(3)
    stage.write_back()
    stage.synchronize()
    assert first.eq(3).all()
    assert second.eq(6).all()

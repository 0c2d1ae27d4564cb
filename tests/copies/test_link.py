"""The contract of `copies.link`, promise by promise: on CUDA streams that work as late as they may, and on the CPU."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from chunkft_fx.copies.link import CudaLink, Link, open_link
from tests.support.stream_machine import CPU, Machine, machine

__all__ = ["machine"]

BOTH = pytest.mark.parametrize("kind", [Link, CudaLink])


def tensors(*values: float) -> list[Tensor]:
    return [torch.full((4,), v) for v in values]


@BOTH
def test_copies_of_one_link_are_done_in_turn(machine: Machine, kind: type[Link]) -> None:
    link = kind(CPU)
    first, second, between, end = tensors(1, 2, 0, 0)
    link.copy([first], [between])
    link.copy([between], [end])  # reads what the copy before writes
    link.copy([second], [between])  # writes over what the copy before reads
    link.wait(link.mark())
    assert bool(end.eq(1).all())
    assert bool(between.eq(2).all())


def test_copies_are_behind_the_work_before(machine: Machine) -> None:
    source, early, late = tensors(0, 0, 0)
    machine.compute_late(lambda: source.fill_(1))
    unordered, link = CudaLink(CPU), CudaLink(CPU)
    unordered.copy([source], [early])
    unordered.synchronize()
    assert bool(early.eq(0).all()), "without follow nothing is promised: the machine would notice"
    link.follow()
    link.copy([source], [late])
    link.synchronize()
    assert bool(late.eq(1).all())


def test_a_copy_does_not_hold_up_work_that_comes_later(machine: Machine) -> None:
    link = CudaLink(CPU)
    source, target = tensors(1, 0)
    link.follow()
    link.copy([source], [target])
    machine.compute_late(lambda: None)
    machine.finish(machine.compute.last)
    assert bool(target.eq(0).all())


@pytest.mark.parametrize("follows", [True, False])
def test_copies_are_behind_those_of_a_link_that_is_followed(machine: Machine, follows: bool) -> None:
    one, other = CudaLink(CPU), CudaLink(CPU)
    source, between, end = tensors(1, 0, 0)
    other.copy([source], [between])
    one.follow(*([other] if follows else []))
    one.copy([between], [end])
    one.synchronize()
    assert bool(end.eq(1 if follows else 0).all())


def test_a_mark_that_is_followed_holds_up_no_more_than_the_copies_before_it(machine: Machine) -> None:
    one, other = CudaLink(CPU), CudaLink(CPU)
    source, before, after, end = tensors(1, 0, 0, 0)
    other.copy([source], [before])
    mark = other.mark()
    other.copy([source], [after])
    one.follow_mark(mark)
    one.copy([before], [end])
    one.synchronize()
    assert bool(end.eq(1).all())
    assert bool(after.eq(0).all())


def test_a_wait_is_for_the_copies_before_its_mark_alone(machine: Machine) -> None:
    link = CudaLink(CPU)
    source, before, after = tensors(1, 0, 0)
    link.copy([source], [before])
    mark = link.mark()
    link.copy([source], [after])
    assert bool(before.eq(0).all()), "without a wait nothing is promised: the machine would notice"
    for _ in range(2):  # any number of times
        link.wait(mark)
        assert bool(before.eq(1).all())
        assert bool(after.eq(0).all())


@BOTH
def test_what_a_mark_holds_lives_until_it_is_waited_for(machine: Machine, kind: type[Link]) -> None:
    link = kind(CPU)
    target = torch.zeros(4)
    gone = weakref.ref(target)
    mark = link.mark([target])
    later = link.mark()
    del target
    link.wait(later)  # the mark holds, whatever else is waited for
    gc.collect()
    assert gone() is not None
    link.wait(mark)
    gc.collect()
    assert gone() is None


@BOTH
def test_what_a_mark_that_was_dropped_holds_lives_until_the_link_is_abandoned(
    machine: Machine, kind: type[Link]
) -> None:
    link = kind(CPU)
    target = torch.zeros(4)
    gone = weakref.ref(target)
    link.mark([target])
    del target
    gc.collect()
    assert gone() is not None
    link.abandon()
    gc.collect()
    assert gone() is None


@BOTH
def test_an_abandoned_link_has_ended_its_copies_and_goes_on(machine: Machine, kind: type[Link]) -> None:
    link = kind(CPU)
    source, first, second, third = tensors(1, 0, 0, 0)
    link.copy([source], [first])
    mark = link.mark([first])
    link.copy([source], [second])
    link.abandon()
    assert bool(first.eq(1).all())
    assert bool(second.eq(1).all())
    link.wait(mark)
    link.copy([source], [third])
    link.wait(link.mark())
    assert bool(third.eq(1).all())


@BOTH
def test_host_memory_may_be_read_once_a_link_is_synchronized(machine: Machine, kind: type[Link]) -> None:
    link = kind(CPU)
    source, host = tensors(1, 0)
    link.copy([source], [host])
    link.synchronize()
    assert bool(host.eq(1).all())


def test_memory_is_reserved_for_the_copies_and_for_the_work_of_now(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved: list[object] = []
    monkeypatch.setattr(Tensor, "record_stream", lambda memory, stream: reserved.append(stream))
    link = CudaLink(CPU)
    link.reserve(torch.zeros(4))
    assert reserved == [link._stream, machine.compute]


def test_the_cpu_copies_at_once() -> None:
    """So that whatever overwrites a buffer too early is wrong on the CPU, too."""
    link = open_link(CPU)
    assert type(link) is Link
    source, target = tensors(1, 0)
    link.copy([source], [target])
    assert bool(target.eq(1).all())


@BOTH
def test_sources_and_targets_come_in_pairs(machine: Machine, kind: type[Link]) -> None:
    with pytest.raises(ValueError, match="zip"):
        kind(CPU).copy(tensors(1, 2), tensors(0))

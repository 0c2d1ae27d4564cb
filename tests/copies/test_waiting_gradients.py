"""Gradients on their way to host memory and back, over streams that work as late, or as early, as they may."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chunkft_fx.copies.link import CudaLink
from chunkft_fx.copies.states.ring import CopyingRing
from chunkft_fx.copies.tier import HostTier
from chunkft_fx.copies.waiting_gradients import WaitingGradients
from chunkft_fx.gradients.waiting import WaitingGradient
from chunkft_fx.graph.layout import wide_dtype
from chunkft_fx.plan.chunk import Chunk, Slice
from chunkft_fx.plan.pieces import Pieces, waiting_nbytes
from tests.support.stream_machine import CPU, Machine, machine

__all__ = ["machine"]

# Shapes with the dimension along which each is cut; slices of the first lie in two pieces, a scalar is one index.
SHAPES = {"a": ((9, 4), 0), "b": ((3, 70), 1), "c": ((), 0), "d": ((5,), 0)}
PIECES = [
    [Slice("a", 0, 0, 4, 9)],
    [Slice("a", 0, 4, 5, 9), Slice("c", 0, 0, 1, 1)],
    [Slice("b", 1, 0, 32, 70)],
    [Slice("b", 1, 32, 38, 70), Slice("d", 0, 0, 5, 5)],
]


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    made = {name: nn.Parameter(torch.zeros(shape, dtype=dtype)) for name, (shape, _) in SHAPES.items()}
    for p in made.values():
        p.grad_dtype = wide_dtype(dtype)
    return made


ALL = Pieces(tuple(Chunk(tuple(slices), 1, 1) for slices in PIECES))


def ring(known: dict[str, nn.Parameter], depth: int) -> CopyingRing:
    return CopyingRing(CudaLink(CPU), CudaLink(CPU), HostTier(CPU), depth, waiting_nbytes(ALL, known))


def made(known: dict[str, nn.Parameter], depth: int) -> WaitingGradients:
    waiting = WaitingGradients(HostTier(CPU), ALL)
    waiting.bind(known, ring(known, depth), lambda: None)
    return waiting


def backward(waiting: WaitingGradients, gradients: Mapping[str, Sequence[Tensor]], depth: int) -> None:
    """What a program does in a backward that makes these contributions."""
    order = [i for i, slices in enumerate(PIECES) if any(s.name in gradients for s in slices)][::-1]
    waiting.begin()
    for i in order[:depth]:
        waiting.fetch_states(i)
    for at, i in enumerate(order):
        names = [s.name for s in PIECES[i] if s.name in gradients]
        given = [(n, g) for n in names for g in gradients[n]]
        waiting.update(i, [n for n, _ in given], [g for _, g in given], at // 2)
        waiting.write_states(i)
        if at + depth < len(order):
            waiting.fetch_states(order[at + depth])
    waiting.complete()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(12))
def test_what_waits_is_the_sum_of_what_came(machine: Machine, seed: int, dtype: torch.dtype) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    machine.chance = rng
    depth = rng.randint(1, 4)
    known = parameters(dtype)
    waiting = made(known, depth)
    for _ in range(4):
        held: dict[str, Tensor] = {}
        for _ in range(rng.randint(1, 3)):
            given = {
                name: [torch.randn(p.shape, dtype=dtype, generator=generator) for _ in range(rng.randint(1, 2))]
                for name, p in known.items()
                if rng.random() < 0.8
            }
            backward(waiting, given, depth)
            for name, contributions in given.items():
                total = contributions[0]
                for g in contributions[1:]:
                    total = total.to(wide_dtype(dtype)) + g
                held[name] = held[name] + total if name in held else total.to(wide_dtype(dtype), copy=True)
            action = rng.choice(["nothing", "read", "scale", "add", "zero"])
            for name, value in held.items():
                gradient = known[name].grad
                assert isinstance(gradient, WaitingGradient)
                if action == "read":
                    assert torch.equal(gradient.clone(), value)
                elif action == "scale":
                    gradient.mul_(0.3)
                    value.mul_(0.3)
                elif action == "add":
                    gradient.add_(torch.ones_like(value))
                    value.add_(1)
                elif action == "zero":
                    gradient.zero_()
                    value.zero_()
        for i in rng.sample(range(len(PIECES)), len(PIECES)):
            waiting.fetch_states(i)
            found = waiting.gradients(i)
            waiting.let_go(i)
            assert found.keys() == {s.name for s in PIECES[i]} & held.keys()
            for s in PIECES[i]:
                if s.name in held:
                    value = held[s.name]
                    part = value.narrow(s.dim, s.start, s.length) if value.ndim else value
                    assert torch.equal(found[s.name].to(value.dtype), part)
        for name, value in held.items():
            gradient = known[name].grad
            assert gradient is not None
            torch.testing.assert_close(gradient.norm(), value.norm(), rtol=1e-5, atol=1e-6)
            assert torch.equal(gradient.clone(), value)
        for p in known.values():
            p.grad = None


def test_gradients_move_with_parameters_that_were_replaced(machine: Machine) -> None:
    known = parameters(torch.float32)
    waiting = made(known, 2)
    backward(waiting, {name: [torch.ones(p.shape)] for name, p in known.items()}, 2)
    other = {**known, "d": nn.Parameter(torch.zeros(5))}
    waiting.bind(other, waiting._ring, lambda: None)
    backward(waiting, {name: [torch.ones(p.shape)] for name, p in other.items()}, 2)
    for name, p in other.items():
        assert p.grad is not None
        assert torch.equal(p.grad.clone(), torch.full(p.shape, 1.0 if name == "d" else 2.0))


def test_another_ring_moves_what_waits(machine: Machine) -> None:
    """As where a plan for another batch, in the middle of a step, has another number of buffers."""
    known = parameters(torch.float32)
    waiting = made(known, 2)
    assert waiting.is_of(replace(ALL, depth=4))
    assert not waiting.is_of(Pieces(ALL.chunks[:2]))
    for turn, depth in enumerate((2, 4, 1), start=1):
        backward(waiting, {name: [torch.ones(p.shape)] for name, p in known.items()}, depth)
        waiting._ring.synchronize()
        waiting.bind(known, ring(known, {2: 4, 4: 1, 1: 1}[depth]), lambda: None)
        for p in known.values():
            assert p.grad is not None
            assert torch.equal(p.grad.clone(), torch.full(p.shape, float(turn)))


def test_copies_come_behind_what_uses_their_memory(machine: Machine) -> None:
    """A sum that the user changed is fetched as it is then; a buffer is filled again behind the step that reads it."""
    known = parameters(torch.float32)
    waiting = made(known, 2)
    backward(waiting, {name: [torch.ones(p.shape)] for name, p in known.items()}, 2)
    moving = waiting._ring
    assert isinstance(moving, CopyingRing)
    links: list[Any] = [moving._incoming, moving._outgoing]
    incoming, outgoing = (link._stream for link in links)
    before = len(incoming.waits)
    gradient = known["d"].grad
    assert gradient is not None
    gradient.add_(torch.ones(5))
    assert [stream for stream, _ in incoming.waits[before:]] == [machine.compute]
    waiting.fetch_states(3)
    waiting.gradients(3)
    before = len(outgoing.waits)
    waiting.let_go(3)
    assert [stream for stream, _ in outgoing.waits[before:]] == [machine.compute]

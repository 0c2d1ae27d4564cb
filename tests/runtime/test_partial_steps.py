"""A step that updates in the backward fails at each of its instructions: nothing was changed, or nothing goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.errors import PartialStep
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.plan import pieces
from chunkft_fx.program.instructions import Instruction
from chunkft_fx.runtime.step import Machine


class Failure(BaseException):
    """What stands for a full device, or a key that was pressed."""


class Small(nn.Module):
    """Two equal layers between a tied embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


IDS = torch.arange(12).remainder(11).view(3, 4)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LARGEST_NBYTES", 1000)


def begun(micro: int = 1) -> tuple[CompiledModule, chunkft_fx.AdamW]:
    """A model that has done one step."""
    module = chunkft_fx.compile(Small(), "1GB", coverage="all", backend="eager")
    optimizer = chunkft_fx.AdamW(module, lr=1e-2, update="backward")
    step(module, optimizer, micro)
    return module, optimizer


def loss_of(module: CompiledModule, micro: int) -> Tensor:
    """The loss of one batch, or of several micro-batches, between whose calls pieces are then updated."""
    if micro == 1:
        loss: Tensor = module(IDS)
        return loss
    return torch.stack(module.accumulate([(IDS + i) % 11 for i in range(micro)])).sum()


def step(module: CompiledModule, optimizer: chunkft_fx.AdamW, micro: int = 1) -> None:
    loss_of(module, micro).backward()
    optimizer.step()
    optimizer.zero_grad()


def failing_at(place: int, is_behind: bool, seen: list[Instruction]) -> Callable[..., Any]:
    """`Machine.run` that fails before or behind its ``place``-th call."""
    run = Machine.run

    def failing(self: Machine, instruction: Instruction, arguments: list[Any]) -> Any:
        seen.append(instruction)
        if len(seen) == place + 1 and not is_behind:
            raise Failure
        results = run(self, instruction, arguments)
        if len(seen) == place + 1:
            raise Failure
        return results

    return failing


def instructions_of_a_backward(monkeypatch: pytest.MonkeyPatch, micro: int = 1) -> int:
    seen: list[Instruction] = []
    loss = loss_of(begun(micro)[0], micro)
    with monkeypatch.context() as patched:
        patched.setattr(Machine, "run", failing_at(10**6, False, seen))
        loss.backward()
    return len(seen)


def assert_refused(module: CompiledModule, optimizer: chunkft_fx.AdamW) -> None:
    """Nothing goes on, and nothing is saved."""
    with pytest.raises(PartialStep, match="ahead of the others"):
        module(IDS).backward()
    for going_on in (optimizer.step, optimizer.state_dict, module.state_dict):
        with pytest.raises(PartialStep, match="ahead of the others"):
            going_on()


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("is_behind", [False, True])
def test_a_failure_at_every_instruction(is_behind: bool, micro: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if micro > 1:  # more pieces of a region than buffers: updates of one stand between calls of the next
        monkeypatch.setattr(pieces, "LARGEST_NBYTES", 300)
        monkeypatch.setattr(pieces, "MOST_BUFFERS", 3)
    module, optimizer = begun(micro)
    twin, other = begun(micro)
    outcomes = set()
    for place in range(instructions_of_a_backward(monkeypatch, micro)):
        before, saved = copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())
        loss = loss_of(module, micro)
        with monkeypatch.context() as patched:
            patched.setattr(Machine, "run", failing_at(place, is_behind, []))
            with pytest.raises(Failure):
                loss.backward()
        weights = {n: p.detach() for n, p in module.named_parameters()}
        is_changed = any(not torch.equal(p, before[n]) for n, p in weights.items())
        outcomes.add(is_changed)
        if is_changed:
            assert_refused(module, optimizer)
            module.load_state_dict(before)
            optimizer.load_state_dict(saved)
        step(module, optimizer, micro)
        step(twin, other, micro)
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q)
    assert outcomes == {False, True}


def test_a_half_step_can_be_accepted_and_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    module, optimizer = begun()
    loss = module(IDS)
    with monkeypatch.context() as patched:
        patched.setattr(Machine, "run", failing_at(instructions_of_a_backward(monkeypatch) - 2, True, []))
        with pytest.raises(Failure):
            loss.backward()
    assert_refused(module, optimizer)
    optimizer.accept_partial_step()
    assert module.state_dict()
    assert optimizer.state_dict()
    step(module, optimizer)

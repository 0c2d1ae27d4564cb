"""Where ``to`` leaves weights: those that the plan streams stay in host memory, whoever moves the module.

On the CPU there is one device. The device ``"meta"`` is the GPU here, as far as it can be: nothing runs on it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chunkft_fx.following import following
from tests.support.forced_streaming import streaming
from tests.support.tiny_lm import TinyLM, lm_batch, lm_compiled

META = torch.device("meta")


class _Counting(TinyLM):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))


def to_meta(t: Tensor) -> Tensor:
    return t.to(META)


def test_on_the_way_to_its_device_only_what_the_plan_has_there_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = lm_compiled(_Counting())
    with streaming("mixed"):
        compiled(**lm_batch())
        training = compiled._training
        streamed = training.residency.streamed
        monkeypatch.setattr(training.residency, "device", META)
        _, placing = training.place(to_meta)
    names = {n for n, p in compiled.named_parameters() if placing(p) is not p}
    assert names == dict(compiled.named_parameters()).keys() - streamed
    assert streamed and names
    assert placing(compiled.seen).device == META


def moving(monkeypatch: pytest.MonkeyPatch, is_planned: bool = False, room: int = -1) -> Any:
    """A compiled module that can be moved to `META`, with a budget of so many bytes more than its weights have."""
    compiled = lm_compiled(_Counting())
    if is_planned:
        compiled(**lm_batch())
    training = compiled._training
    budget = sum(p.nbytes for p in compiled.parameters()) + room
    monkeypatch.setattr(training, "options", replace(training.options, budget_bytes=budget))
    monkeypatch.setattr(following, "compute_device", lambda model, device: device)
    return compiled


@pytest.mark.parametrize("is_planned", [False, True])
def test_on_the_way_to_another_device_weights_wait_for_its_plan(
    monkeypatch: pytest.MonkeyPatch, is_planned: bool
) -> None:
    compiled = moving(monkeypatch, is_planned)
    move, placing = compiled._training.place(to_meta)
    assert move.device == META
    assert all(placing(p).device.type == "cpu" for p in compiled.parameters())
    assert placing(compiled.seen).device == META


def test_weights_that_the_budget_has_room_for_move_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = moving(monkeypatch, room=0)
    _, placing = compiled._training.place(to_meta)
    assert all(placing(p).device == META for p in compiled.parameters())


def test_a_dtype_that_comes_with_a_device_is_given_to_weights_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = moving(monkeypatch)
    _, placing = compiled._training.place(lambda t: t.to(META, torch.float64))
    placed = placing(compiled.embed.weight)
    assert (placed.device.type, placed.dtype) == ("cpu", torch.float64)


def test_a_module_around_it_moves_it_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = moving(monkeypatch)
    anew: list[Any] = []
    monkeypatch.setattr(compiled._training, "_begin_anew", anew.append)
    nn.ModuleList([compiled]).to(META)
    assert anew == [META]
    assert all(p.device.type == "cpu" for p in compiled.parameters())
    assert compiled.seen.device == META

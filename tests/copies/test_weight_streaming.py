"""Weights that stay in host memory: same gradients, same training, and a model that still answers as the plain one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import chunkft_fx
from chunkft_fx.errors import OptionError, StaleBackward, UnsupportedGraph
from chunkft_fx.graph import ops
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.tools.zoo import tiny
from tests.support.equivalence import assert_same_gradients, loss_of, smallest_budget

SLOW = [(family, dropout) for family in ("llama", "gpt2", "t5", "bert") for dropout in (0.0, 0.2)]
SLOW = [case for case in SLOW if case not in (("llama", 0.0), ("gpt2", 0.2))]
FAMILIES = (("llama", 0.0), ("gpt2", 0.2), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW))


def tight(model: nn.Module, batch: dict[str, Any], chunks: int = 3) -> CompiledModule:
    """A compiled copy under the smallest feasible budget, which keeps no weight on the device for long."""
    smallest = smallest_budget(model, batch, chunks)
    compiled = chunkft_fx.compile(copy.deepcopy(model), smallest, chunks=chunks, interval=1, backend="eager")
    compiled(**batch)
    return compiled


@pytest.mark.parametrize(("family", "dropout"), FAMILIES)
def test_gradients_of_streamed_weights_equal_the_dense_ones(family: str, dropout: float) -> None:
    model, batch = tiny(family, dtype=torch.float64, dropout=dropout)
    model.train()
    compiled = tight(model, batch(2, 12, 0))
    assert compiled.plan.streamed
    assert_same_gradients(compiled, model, batch(2, 12, 0), 1e-9)
    assert any(node.target is ops.fetch for node in compiled.program.graph.nodes)


@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.2, marks=pytest.mark.slow)])
def test_training_with_streamed_weights_is_training_with_resident_ones_to_the_bit(dropout: float) -> None:
    model, batch = tiny("llama", dropout=dropout)
    resident = chunkft_fx.compile(copy.deepcopy(model), "64GB", chunks=3, interval=1, backend="eager")
    streamed = tight(model, batch(2, 12, 0))
    for compiled in (resident, streamed):
        optimizer = chunkft_fx.AdamW(compiled, lr=1e-2)
        torch.manual_seed(0)
        for step in range(6):
            loss_of(compiled(**batch(2, 12, step))).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert streamed.plan.streamed
    assert not resident.plan.streamed
    for (name, a), b in zip(resident.state_dict().items(), streamed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_weights_are_whole_outside_of_a_call() -> None:
    model, batch = tiny("llama")
    compiled = tight(model, batch(2, 12, 0))
    loss = loss_of(compiled(**batch(2, 12, 0)))
    for again in (
        compiled.state_dict(),
        copy.deepcopy(compiled).state_dict(),
        pickle.loads(pickle.dumps(compiled)).state_dict(),
    ):
        for (name, value), plain in zip(again.items(), model.state_dict().values(), strict=True):
            assert torch.equal(value, plain), name
    compiled.eval()
    with torch.no_grad():
        torch.testing.assert_close(loss_of(compiled(**batch(2, 12, 0))), loss.detach())


def test_weights_come_back_when_a_call_fails() -> None:
    model, batch = tiny("llama")
    compiled = tight(model, batch(2, 12, 0))
    with pytest.raises(UnsupportedGraph):
        compiled(input_ids="no tensor")
    for (name, value), plain in zip(compiled.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(value, plain), name


def test_two_forwards_before_their_backwards_share_the_ring() -> None:
    model, batch = tiny("llama", dtype=torch.float64)
    model.train()
    resident = chunkft_fx.compile(copy.deepcopy(model), "64GB", chunks=3, interval=1, backend="eager")
    streamed = tight(model, batch(2, 12, 0))
    for compiled in (resident, streamed):
        first, second = (loss_of(compiled(**batch(2, 12, seed))) for seed in (0, 1))
        first.backward()
        second.backward()
    for a, b in zip(resident.active_slices(), streamed.active_slices(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_a_streamed_weight_that_changed_before_backward_is_noticed() -> None:
    model, batch = tiny("llama")
    compiled = tight(model, batch(2, 12, 0))
    loss = loss_of(compiled(**batch(2, 12, 0)))
    name = max(n for n in compiled.plan.streamed if "down_proj" in n)
    with torch.no_grad():
        dict(compiled.named_parameters())[name].mul_(2)
    with pytest.raises(StaleBackward, match="changed in place"):
        loss.backward()


def test_a_device_that_does_not_exist_is_refused() -> None:
    model, _ = tiny("llama")
    with pytest.raises(OptionError, match="not supported"):
        chunkft_fx.compile(model, "1GB", device="meta")

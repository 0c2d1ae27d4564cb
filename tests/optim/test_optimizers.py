"""What every optimizer of this library does alike, whatever its update is."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import chunkft_fx
from chunkft_fx.errors import OptimizerMismatch, OptionError
from chunkft_fx.optim.optimizer import ChunkedOptimizer
from tests.support.small_net import batch, compiled, feed, net

KINDS: list[Callable[[Any], ChunkedOptimizer]] = [
    chunkft_fx.AdamW,
    chunkft_fx.SGD,
    lambda model: chunkft_fx.SGD(model, momentum=0.9),
    chunkft_fx.Adafactor,
    lambda model: chunkft_fx.optimizer(model, torch.optim.NAdam),
]


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_makes_backwards_through_the_old_weights_stale(
    make: Callable[[Any], ChunkedOptimizer], dtype: torch.dtype
) -> None:
    module = compiled(net(dtype), 3)
    optimizer = make(module)
    feed(module, 0)
    updated = [s.parameter for s in module.active_slices()]
    before = [p._version for p in updated]
    optimizer.step()
    assert updated
    assert all(p._version > v for p, v in zip(updated, before, strict=True))


@pytest.mark.parametrize("make", KINDS)
def test_an_optimizer_belongs_to_its_module(make: Callable[[Any], ChunkedOptimizer]) -> None:
    optimizer = make(compiled(net()))
    name = re.escape(optimizer.spec.optimizer)
    with pytest.raises(OptimizerMismatch, match=rf"chunkft_fx\.{name} made for the other module"):
        pickle.dumps(optimizer)
    with pytest.raises(OptimizerMismatch, match=rf"{name} was given a .*small_net\.Net"):
        make(net())
    with pytest.raises(OptionError, match="a group cannot be added"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


@pytest.mark.parametrize("make", KINDS)
def test_a_strange_parameter_in_a_group_is_refused(make: Callable[[Any], ChunkedOptimizer]) -> None:
    module = compiled(net())
    optimizer = make(module)
    optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.ones(2)))
    optimizer.param_groups[0]["param_names"].append("strange")
    feed(module, 0)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    with pytest.raises(OptionError, match=r"shape \[2\]"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())


@pytest.mark.parametrize("make", KINDS)
def test_a_closure_is_evaluated_and_its_loss_returned(make: Callable[[Any], ChunkedOptimizer]) -> None:
    module = compiled(net(), 2)
    optimizer = make(module)

    def closure() -> float:
        optimizer.zero_grad()
        loss = module(batch(0))
        loss.backward()
        return float(loss.detach())

    losses = [optimizer.step(closure) for _ in range(4)]
    assert losses[0] > losses[-1]


@pytest.mark.parametrize("update", ["step", "late", "backward"])
def test_a_step_does_not_walk_through_the_model(update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a deep model that takes a millisecond, for which a GPU waits behind a trainer that looks at each loss."""
    module: Any = chunkft_fx.compile(net(), "1GB", coverage="all", backend="eager")
    optimizer = chunkft_fx.AdamW(module, update=update)

    def step(seed: int) -> None:
        feed(module, seed)
        optimizer.step()

    step(0)
    optimizer.zero_grad()
    monkeypatch.delattr(torch.nn.Module, "named_modules")
    step(1)

"""Small models for tests: numbered blocks around an odd operator, so that it lies in a repeated region."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.module.module import CompiledModule
from tests.support.equivalence import assert_same_gradients, smallest_budget

WIDTH = 6


class Block(nn.Module):
    """Two linear layers and ``step``, which is given the block and its input."""

    def __init__(self, step: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.step = step

    def forward(self, h: Tensor) -> Tensor:
        return self.step(self, h)


class Blocks(nn.Module):
    """``first``, two residual blocks, ``last``, and the sum of squares as the loss."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(make() for _ in range(2))

    def body(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = h + layer(h)
        return self.last(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.first(x)).square().sum()


def blocks_of(step: Callable[[Any, Tensor], Tensor]) -> Blocks:
    """A model in float64, in training mode, whose two blocks do ``step``."""
    torch.manual_seed(0)
    return Blocks(lambda: Block(step)).double().train()


def rows(count: int = 4) -> dict[str, Any]:
    torch.manual_seed(1)
    return {"x": torch.randn(count, WIDTH, dtype=torch.float64)}


def compiled(model: nn.Module, chunks: int = 1, budget: int | str = "1GB") -> CompiledModule:
    """A copy of the model, compiled, its graphs run as they are."""
    return chunkft_fx.compile(copy.deepcopy(model), budget, chunks=chunks, interval=1, backend="eager")


def assert_trains_exactly(model: nn.Module, batch: dict[str, Any], shared: bool = True) -> None:
    """Gradients of one and of three chunks equal the plain model's; with ``shared``, equal blocks share a template."""
    for chunks in (1, 3):
        module = compiled(model, chunks)
        assert_same_gradients(module, model, batch, 1e-9)
        if shared:
            labels = [len(t.regions) for t in module.templates]
            assert max(labels) == 2, f"the two blocks share no template: {labels}"


def assert_recomputes_exactly(model: nn.Module, batch: dict[str, Any]) -> None:
    """The same under a budget that leaves nothing but to recompute activations in backward."""
    module = compiled(model, 3, smallest_budget(model, batch, 3))
    assert_same_gradients(module, model, batch, 1e-9)
    assert any(v.demand.policy.recompute for v in module.variants)

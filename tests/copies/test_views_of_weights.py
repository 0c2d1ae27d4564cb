"""A view of a streamed weight lives no longer than the weight's buffer: others take it anew, or get a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from tests.support.equivalence import assert_same_gradients
from tests.support.forced_streaming import streaming
from tests.support.random_model import Attention

WIDTH = 6
# What is taken of a stacked weight before the blocks, and read in the blocks.
BEFORE: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {
    "items": lambda stacked: stacked.unbind(),
    "parts": lambda stacked: [part.squeeze(0) for part in stacked.split(1)],
    "transposed": lambda stacked: [stacked[0].t()] * 3,
    "whole": lambda stacked: list(stacked.permute(0, 2, 1)),
}


class Shared(nn.Module):
    """Blocks that multiply with parts of one weight of the model's."""

    def __init__(self, take: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self.take = take
        self.stacked = nn.Parameter(torch.randn(3, WIDTH, WIDTH) * 0.4)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        taken = self.take(self.stacked)
        x = self.first(x)
        for layer, weight in zip(self.layers, taken, strict=True):
            x = x + torch.tanh(layer(x) @ weight)
        last: Tensor = self.last(x)
        return last.square().sum()


class Inner(nn.Module):
    """A layer of attention behind two others: it takes its own weight apart, and its backward reads the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), Attention(), nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(0)
        for layer in self.layers:
            x = x + layer(x)
        return x.square().sum()


def assert_streams_exactly(model: nn.Module, share: str) -> None:
    model.double()
    batch = {"x": torch.randn(4, WIDTH, dtype=torch.float64)}
    with streaming(share):
        compiled = chunkft_fx.compile(copy.deepcopy(model), "1GB", chunks=1, backend="eager")
        assert_same_gradients(compiled, model, batch, 1e-9)


@pytest.mark.parametrize("share", ["all", "mixed"])
@pytest.mark.parametrize("take", BEFORE)
def test_a_view_that_other_regions_read(take: str, share: str) -> None:
    assert_streams_exactly(Shared(BEFORE[take]), share)


def test_a_view_that_the_backward_reads() -> None:
    assert_streams_exactly(Inner(), "all")

"""Operators whose real results lie in memory in another order than torch's tracing says: the numbers stay right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import chunkft_fx
from tests.support.equivalence import assert_same_gradients


class _Transposed(nn.Module):
    """A projection whose gradient reaches it through an activation, transposed."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.rand(4, 5))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        active = self.activation(self.first(x)).transpose(-1, -2).contiguous()
        return torch.exp(self.scale * active).tanh().sum()


@pytest.mark.parametrize(
    "activation",
    [
        functional.softplus,
        functional.elu,
        functional.hardswish,
        functional.mish,
        functional.logsigmoid,
        functional.gelu,
    ],
)
def test_gradients_through_transposed_activations_equal_the_plain_models(
    activation: Callable[[Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    model = _Transposed(activation).double()
    compiled = chunkft_fx.compile(model, "1GB", chunks=2, interval=1, backend="eager")
    assert_same_gradients(compiled, model, {"x": torch.randn(3, 5, 6).double()}, 1e-9)

"""A function of a weight and a batch, split and whole: outputs and gradients must be equal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import chunkft_fx
from tests.support.forced_splits import split_into

Function = Callable[..., Any]


class Applied(nn.Module):
    """Applies a function to a weight ``f64[6, 6]`` and its inputs."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self.weight, *inputs)


def check_split(function: Function, inputs: Sequence[Tensor], parts: int) -> None:
    """Compare a call in ``parts`` with the whole one; `BudgetInfeasible` if it is not split."""
    torch.manual_seed(0)
    plain = Applied(function)
    compiled = chunkft_fx.compile(copy.deepcopy(plain), "1GB", coverage="all", backend="eager", return_logits=True)
    with split_into(parts):
        ours = _outputs(compiled(*inputs))
        theirs = _outputs(plain(*inputs))
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs, strict=True):
            assert a.requires_grad == b.requires_grad
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
        if not any(b.requires_grad for b in theirs):
            return
        assert compiled.plan.policy.micro_batches == parts
        for outputs in (ours, theirs):
            _weighted(outputs).backward()
    (found,) = compiled.active_slices()
    assert plain.weight.grad is not None
    torch.testing.assert_close(found.grad, plain.weight.grad, rtol=1e-9, atol=1e-9, equal_nan=True)


def _outputs(returned: Any) -> list[Tensor]:
    return [returned] if isinstance(returned, Tensor) else list(returned)


def _weighted(outputs: Sequence[Tensor]) -> Tensor:
    """A sum in which every element counts with another weight."""
    generator = torch.Generator().manual_seed(7)
    parts = [(o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs if o.requires_grad]
    return torch.stack(parts).sum()

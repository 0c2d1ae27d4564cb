"""Random chains of operators, some of which mix samples: they are split and equal, or not split."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from chunkft_fx.errors import BudgetInfeasible
from tests.splitting.test_rules import batch
from tests.support.split_twin import check_split

Step = Callable[[Tensor, Tensor], Tensor]

# From a value of any shape, whose first size may be that of the batch or not, and the weight, another value.
STEPS: dict[str, Step] = {
    "first_with_last": lambda w, y: y.transpose(0, -1),
    "last_two": lambda w, y: y.transpose(-1, -2) if y.ndim > 1 else y,
    "merge": lambda w, y: y.flatten(0, 1) if y.ndim > 1 else y,
    "merge_all_but_one": lambda w, y: y.reshape(-1, y.shape[-1]),
    "divide": lambda w, y: y.unflatten(0, (2, -1)) if y.shape[0] % 2 == 0 else y,
    "divide_other": lambda w, y: y.unflatten(-1, (-1, 2)) if y.shape[-1] % 2 == 0 else y,
    "front": lambda w, y: y[None],
    "multiply": lambda w, y: y @ w if y.shape[-1] == 6 else y * w[0, 0],
    "tanh": lambda w, y: torch.tanh(y),
    "broadcast": lambda w, y: y + w[1, : y.shape[-1]] if y.shape[-1] <= 6 else y,
    "of_itself": lambda w, y: y @ y.transpose(-1, -2) / 9 if y.ndim > 1 else y,
    "softmax": lambda w, y: y.softmax(0),
    "softmax_last": lambda w, y: y.softmax(-1),
    "sum_first": lambda w, y: y.sum(0) if y.ndim > 1 else y,
    "mean_last": lambda w, y: y.mean(-1, keepdim=True),
    "centred": lambda w, y: y - y.mean(0, keepdim=True),
    "normed": lambda w, y: functional.layer_norm(y, y.shape[-1:]),
    "half": lambda w, y: y[: y.shape[0] // 2 + 1],
    "second": lambda w, y: y[:, 1:] if y.ndim > 1 and y.shape[1] > 1 else y,
    "pooled": lambda w, y: y.max(1).values if y.ndim > 1 else y,
    "sorted": lambda w, y: y.sort(0).values,
    "sorted_last": lambda w, y: y.sort(-1).values,
    "joined": lambda w, y: torch.cat([y, 2 * y], 0),
    "joined_last": lambda w, y: torch.cat([y, 2 * y], -1),
    "turned": lambda w, y: y.flip(0),
    "repeated": lambda w, y: y.repeat(2, *[1] * (y.ndim - 1)),
    "scaled": lambda w, y: y / y.shape[0],
    "rows": lambda w, y: y[torch.arange(y.shape[0])],
    "triangle": lambda w, y: y.tril() if y.ndim > 1 else y,
    "summed_up": lambda w, y: y.cumsum(-1),
}
ENDS: dict[str, Step] = {
    "as_it_is": lambda w, y: y,
    "sum": lambda w, y: y.square().sum(),
    "mean": lambda w, y: y.square().mean() + 0.1 * w.square().sum(),
    "share": lambda w, y: (y * (y > 0)).sum() / (y.shape[0] + 1),
}


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(
    names=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6),
    end=st.sampled_from(sorted(ENDS)),
    parts=st.sampled_from([2, 4]),
    shape=st.sampled_from([(6, 6), (4, 6), (1, 6), (6,), (8, 6)]),
)
def test_random_chains(names: list[str], end: str, parts: int, shape: tuple[int, ...]) -> None:
    def chain(w: Tensor, x: Tensor) -> Tensor:
        y = x @ w
        for name in names:
            y = STEPS[name](w, y)
        return ENDS[end](w, y)

    refused = ""
    try:
        check_split(chain, [batch(*shape)], parts)
    except BudgetInfeasible as error:
        refused = str(error)
    assert not refused or "not split into micro-batches, because" in refused

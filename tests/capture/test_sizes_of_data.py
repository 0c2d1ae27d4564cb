"""Sizes that depend on data: rows chosen by a mask, routed to experts, repeated, or cut at a number in a tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.torch_sizes import UNBOUNDED
from tests.support.equivalence import assert_same_gradients
from tests.support.odd_blocks import (
    WIDTH,
    Block,
    Blocks,
    assert_recomputes_exactly,
    assert_trains_exactly,
    blocks_of,
    compiled,
    rows,
)

Step = Callable[[Any, Tensor], Tensor]


def by_mask(block: Any, h: Tensor) -> Tensor:
    g = block.a(h)
    mask = g[:, 0] > 0
    return torch.zeros_like(h).index_put((mask,), block.b(g[mask].exp().sin().tanh()))


def by_index(block: Any, h: Tensor) -> Tensor:
    index = (h[:, 0] > 0).nonzero().squeeze(1)
    return torch.zeros_like(h).index_add(0, index, block.b(block.a(h)[index]))


def experts(block: Any, h: Tensor) -> Tensor:
    weight, chosen = block.a(h)[:, :2].softmax(-1).topk(1, -1)
    out = torch.zeros_like(h)
    for k, expert in enumerate((block.a, block.b)):
        row, column = torch.where(chosen == k)
        out = out.index_add(0, row, expert(h[row]) * weight[row, column, None])
    return out


def grouped(block: Any, h: Tensor) -> Tensor:
    values, group = torch.unique((h[:, 0] * 2).round().long(), return_inverse=True)
    sums = torch.zeros(values.shape[0], WIDTH, dtype=h.dtype).index_add(0, group, block.a(h))
    return block.b(sums)[group]


def plain(block: Any, h: Tensor) -> Tensor:
    return block.b(block.a(h).sin())


class Selected(Blocks):
    """The size is made before the blocks and flows through all of them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.first(x)[x[:, 0] > 0]).square().sum()


class Repeated(Blocks):
    """Torch knows no bound of this size."""

    def forward(self, x: Tensor, times: Tensor) -> Tensor:  # type: ignore[override]
        return self.body(torch.repeat_interleave(self.first(x), times, dim=0)).square().sum()


class Cut(Blocks):
    def forward(self, x: Tensor, length: Tensor) -> Tensor:  # type: ignore[override]
        n = int(length.item())
        torch._check(n >= 1)
        torch._check(n <= x.shape[0])
        return self.body(self.first(x)[:n]).square().sum()


class Bounded(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        count = int((x[:, 0] > 0).sum().item())
        torch._check(count <= 4)
        return self.body(self.first(x)).square().sum() + x.new_ones(count).sum()


class Images(Blocks):
    """Features of images take the places that a mask marks among the embeddings, as in vision-language models."""

    def forward(self, x: Tensor, image: Tensor) -> Tensor:  # type: ignore[override]
        h, mask = self.first(x), (x[:, :1] > 0).expand_as(x)
        return self.body(h.masked_scatter(mask, self.last(image))).square().sum()


def whole(kind: type[Blocks]) -> nn.Module:
    torch.manual_seed(0)
    return kind(lambda: Block(plain)).double().train()


WHOLE: list[tuple[type[Blocks], dict[str, Any]]] = [
    (Selected, rows(8)),
    (Repeated, {**rows(4), "times": torch.tensor([1, 0, 3, 2])}),
    (Cut, {**rows(8), "length": torch.tensor(5)}),
    (Images, {**rows(8), "image": rows(8)["x"] * 2}),
]


@pytest.mark.parametrize(
    "step", [by_mask, *(pytest.param(s, marks=pytest.mark.slow) for s in (by_index, experts, grouped))]
)
def test_a_size_inside_of_a_repeated_block(step: Step) -> None:
    assert_trains_exactly(blocks_of(step), rows(8))


@pytest.mark.parametrize(
    ("kind", "batch"), [pytest.param(*case, marks=() if i == 0 else pytest.mark.slow) for i, case in enumerate(WHOLE)]
)
def test_a_size_that_flows_through_all_blocks(kind: type[Blocks], batch: dict[str, Any]) -> None:
    assert_trains_exactly(whole(kind), batch)


@pytest.mark.parametrize("step", [by_mask, pytest.param(experts, marks=pytest.mark.slow)])
def test_gradients_are_exact_when_the_choice_is_computed_again(step: Step) -> None:
    assert_recomputes_exactly(blocks_of(step), rows(256))


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (blocks_of(by_mask), rows(8)),
        pytest.param(whole(Selected), rows(8), marks=pytest.mark.slow),
        pytest.param(whole(Repeated), WHOLE[1][1], marks=pytest.mark.slow),
        pytest.param(whole(Cut), WHOLE[2][1], marks=pytest.mark.slow),
    ],
)
def test_inductor_compiles_sizes_of_data(model: nn.Module, batch: dict[str, Any]) -> None:
    module = chunkft_fx.compile(copy.deepcopy(model), "1GB", chunks=2, interval=1)
    assert_same_gradients(module, model, batch, 1e-9)


def test_one_program_serves_every_number_of_rows() -> None:
    """Also none and all of them."""
    model = whole(Selected)
    module = compiled(model, 2)
    for shift in (0.0, 0.3, 100.0):
        assert_same_gradients(module, model, {"x": rows(8)["x"] + shift}, 1e-9)
    module.zero_grad()
    loss = module(x=rows(8)["x"] - 100)
    loss.backward()
    assert loss.item() == 0 and not any(s.grad.any() for s in module.active_slices() if s.grad is not None)
    assert len(module._training.sessions) == 1


def test_a_bound_that_the_model_states_is_checked_at_each_call() -> None:
    module = compiled(whole(Bounded))
    columns = torch.ones(8, WIDTH, dtype=torch.float64)
    signs = torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1], dtype=torch.float64)[:, None]
    module(x=columns * signs).backward()
    with pytest.raises(RuntimeError, match=r"Runtime assertion failed.*<= 4"):
        module(x=columns)


def test_a_plan_counts_on_the_largest_number_of_rows() -> None:
    """All rows of the mask, where torch knows the mask; a fixed number where nothing is known."""
    peaks = []
    for kind, batch in WHOLE[:2]:
        module = compiled(whole(kind))
        module(**batch)
        peaks.append(module.plan.predicted_peak_bytes or 0)
    assert peaks[0] < 8 * 8 * WIDTH * 100 < UNBOUNDED * 8 * WIDTH < peaks[1]

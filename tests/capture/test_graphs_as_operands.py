"""Operators that take graphs as operands stay whole inside of a repeated region, and give autograd's own gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.map import map as mapped
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

import chunkft_fx
from chunkft_fx.torch_internals import is_random
from tests.support.equivalence import assert_same_gradients
from tests.support.odd_blocks import assert_recomputes_exactly, assert_trains_exactly, blocks_of, compiled, rows

Step = Callable[[Any, Tensor], Tensor]

# the plain model compiles such operators itself when it is called, and torch looks at gradients of their operands
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def branch(block: Any, h: Tensor) -> Tensor:
    """Weights are read inside of the branches."""
    return torch.cond(h.sum() > 0, lambda t: block.b(t).sin(), lambda t: block.a(t).cos(), (block.a(h),))


def branch_among_others(block: Any, h: Tensor) -> Tensor:
    """There is enough to save around the branch that a small budget has it computed again."""
    g = block.a(h).exp().sin().tanh()
    return block.b(torch.cond(h.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (g,)).exp().sin().tanh())


def branch_in_branch(block: Any, h: Tensor) -> Tensor:
    def inner(t: Tensor) -> Tensor:
        return torch.cond(t.max() > 1, lambda y: y * 2, lambda y: y.exp(), (t,))

    return block.b(torch.cond(h.sum() > 0, inner, lambda t: t.cos(), (block.a(h),)))


def loop(block: Any, h: Tensor) -> Tensor:
    _, t = while_loop(lambda i, t: i < 3, lambda i, t: (i + 1, (t * 0.5).sin()), (torch.tensor(0), block.a(h)))
    return block.b(t)


def loop_without_gradient(block: Any, h: Tensor) -> Tensor:
    start = (torch.tensor(0), h.detach())
    count, _ = while_loop(lambda i, t: t.norm() > 0.1, lambda i, t: (i + 1, t * 0.5), start)
    return block.b(block.a(h).sin()) * count


def recurrence(block: Any, h: Tensor) -> Tensor:
    def step(carry: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.tanh(block.a(carry) + x)
        return new, new * 2

    return block.b(scan(step, torch.zeros_like(h[0]), h, dim=0)[1])


def row_by_row(block: Any, h: Tensor) -> Tensor:
    return block.b(mapped(lambda x, y: (x * y).sin(), block.a(h), h[0]))  # type: ignore[arg-type]


@torch.compiler.nested_compile_region
def region_of_torchs_own(block: Any, h: Tensor) -> Tensor:
    """Torch keeps such a function as a graph that is called by name."""
    return block.b(block.a(h).sin())


RELATIVES = [region_of_torchs_own, branch_in_branch, loop, loop_without_gradient, recurrence, row_by_row]
ALL = [branch, *(pytest.param(step, marks=pytest.mark.slow) for step in RELATIVES)]


@pytest.mark.parametrize("step", ALL)
def test_gradients_equal_the_plain_models(step: Step) -> None:
    assert_trains_exactly(blocks_of(step), rows())


@pytest.mark.parametrize(
    "step", [row_by_row, *(pytest.param(s, marks=pytest.mark.slow) for s in (branch_among_others, recurrence))]
)
def test_gradients_are_exact_when_the_operator_is_computed_again(step: Step) -> None:
    assert_recomputes_exactly(blocks_of(step), rows(64))


def test_both_branches_are_taken_as_the_data_says() -> None:
    """One program serves both outcomes: the predicate is read at each call."""
    model = blocks_of(branch)
    module = compiled(model)
    for sign in (1, -1):
        batch = {"x": sign * rows()["x"]}
        want = model(**batch)
        torch.testing.assert_close(module(**batch), want, rtol=1e-12, atol=0)


def test_an_operator_that_draws_inside_of_its_graphs_counts_as_random() -> None:
    def noisy(block: Any, h: Tensor) -> Tensor:
        return block.b(torch.cond(h.sum() > 0, torch.rand_like, lambda t: t.cos(), (block.a(h),)))

    module = compiled(blocks_of(noisy))
    module(**rows())
    nodes = [node for template in module.templates for node in template.graph.graph.nodes]
    assert any(is_random(node) for node in nodes)


@pytest.mark.slow
@pytest.mark.parametrize("step", [branch, loop, row_by_row])
def test_inductor_compiles_the_operator(step: Step) -> None:
    model = blocks_of(step)
    module = chunkft_fx.compile(copy.deepcopy(model), "1GB", chunks=3, interval=1)
    assert_same_gradients(module, model, rows(), 1e-9)

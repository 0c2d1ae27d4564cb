"""A head's slices sink into its operators, and forward and backward become one operator."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from chunkft_fx.graph.region import RegionGraph
from chunkft_fx.head import operators as head
from tests.passes.joint import Joint, Refusal, assert_sunk, check, count, joint, refused

aten = torch.ops.aten

TOKENS, CLASSES, FEATURES = 7, 13, 5
LABELS = torch.tensor([0, 3, -100, 12, 3, -100, 7])


def loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float = 0.0, mean: bool = True
) -> Tensor:
    result: Tensor = head.forward(hidden, weight, bias, labels, -100, smoothing, mean)
    return result


def case(
    function: Callable[..., Tensor], *sizes: tuple[int, ...], dtype: torch.dtype = torch.float64, inductor: bool = False
) -> Joint:
    return joint(function, [torch.randn(s).to(dtype) for s in sizes], [LABELS], inductor=inductor)


HIDDEN, WEIGHT, BIAS = (TOKENS, FEATURES), (CLASSES, FEATURES), (CLASSES,)


def merged(region: RegionGraph) -> list[Any]:
    """The mask and the slices of the one operator that a head has become."""
    assert count(region, head.forward) == 0 and count(region, head.backward) == 0
    (node,) = region.graph.find_nodes(op="call_function", target=head.grad)
    assert node.meta["partitioner_tag"] == "is_forward"
    return [a.name if hasattr(a, "name") else a for a in node.args[7:]]


@pytest.mark.parametrize("inductor", [False, True], ids=["aten", "inductor"])
@pytest.mark.parametrize("dim", [0, 1])
def test_one_operator_computes_what_is_asked(dim: int, inductor: bool) -> None:
    """Input gradient, a slice of the weight's along either dimension, and a slice of the bias's."""
    made = case(loss, HIDDEN, WEIGHT, BIAS, inductor=inductor)
    region = check(made, "whole", (dim, 1, 3), (0, 2, 4))
    assert_sunk(region, CLASSES * FEATURES)
    assert merged(region) == [[True, True, True], "start_1", dim, 3, "start_2", 4]
    assert merged(check(made, "whole", None, None)) == [[True, False, False], None, 0, 0, None, 0]
    assert merged(check(made, None, "whole", None)) == [[False, True, False], None, 0, 0, None, 0]
    assert merged(check(made, None, None, (0, 2, 4))) == [[False, False, True], None, 0, 0, "start_2", 4]
    assert merged(check(made, "whole", "whole", "whole")) == [[True, True, True], None, 0, 0, None, 0]


def test_without_a_demand_only_the_loss_is_computed() -> None:
    region = check(case(loss, HIDDEN, WEIGHT, BIAS), None, None, None)
    assert count(region, head.forward) == 1
    assert count(region, head.backward) == count(region, head.grad) == 0


@settings(max_examples=25)
@given(st.data())
def test_any_demand_equals_autograd(data: st.DataObject) -> None:
    """Other settings, a tangent other than 1, and a wider graph around the head."""
    draw = data.draw
    smoothing, mean, is_tied = draw(st.sampled_from([0.0, 0.1])), draw(st.booleans()), draw(st.booleans())

    def function(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        rows = functional.embedding(labels.clamp(min=0), weight) + hidden if is_tied else hidden
        return loss(rows.tanh(), weight, bias, labels, smoothing, mean) * 3

    made = case(function, HIDDEN, WEIGHT, BIAS)
    asked = [draw(st.sampled_from([None, "whole"])), draw(_demand(WEIGHT)), draw(_demand(BIAS))]
    region = check(made, *asked)
    assert count(region, head.backward) == 0
    assert region.dense == []


def _demand(sizes: tuple[int, ...]) -> st.SearchStrategy[Any]:
    cuts = [
        (dim, start, length)
        for dim, size in enumerate(sizes)
        for length in range(1, size)
        for start in (0, size - length)
    ]
    return st.one_of(st.none(), st.just("whole"), st.sampled_from(cuts))


def test_low_precision_is_multiplied_by_the_tangent_in_float32() -> None:
    """A tangent that bf16 cannot hold must not be rounded before it scales the gradient."""
    made = case(lambda h, w, y: loss(h, w, None, y) * 1.005, HIDDEN, WEIGHT, dtype=torch.bfloat16)
    region = check(made, "whole", (0, 0, 4), tolerance=2 * torch.finfo(torch.bfloat16).eps)
    products = [n for n in region.graph.nodes if n.target is aten.mul.Tensor and n.meta["val"].ndim == 2]
    assert [n.meta["val"].dtype for n in products] == [torch.float32] * 2


def test_several_heads_are_merged_each_for_itself() -> None:
    def function(h: Tensor, w: Tensor, v: Tensor, y: Tensor) -> Tensor:
        return loss(h, w, None, y) + loss(h * 2, v, None, y) * 0.5

    region = check(case(function, HIDDEN, WEIGHT, WEIGHT), "whole", (0, 1, 4), (1, 0, 2))
    assert count(region, head.grad) == 2
    assert count(region, head.backward) == count(region, head.forward) == 0


def test_refuses_float16(caplog: pytest.LogCaptureFixture) -> None:
    made = case(lambda h, w, y: loss(h, w, None, y), HIDDEN, WEIGHT, dtype=torch.float16)
    with caplog.at_level(logging.DEBUG, logger="chunkft_fx.passes"):
        region = check(made, "whole", (0, 1, 3), tolerance=4e-3)
    assert "may underflow" in caplog.text
    assert (count(region, head.forward), count(region, head.backward), count(region, head.grad)) == (1, 2, 0)


def test_refuses_a_start_that_is_computed(caplog: pytest.LogCaptureFixture) -> None:
    """The weight is a view of a longer one: where the slice starts in it is computed in the backward."""
    made = case(lambda h, w, y: loss(h, w.view(CLASSES, 6), None, y), (TOKENS, 6), (CLASSES, 2, 3))
    with caplog.at_level(logging.DEBUG, logger="chunkft_fx.passes"):
        region = check(made, "whole", (1, 1, 1))
    assert "start of a slice is computed" in caplog.text
    assert count(region, head.backward) == 2


_GRADIENT = (torch.tensor(1.0), torch.randn(5, 4), torch.randn(7, 4), None, torch.zeros(5, dtype=torch.int64), -100)
REFUSALS: dict[str, Refusal] = {
    "input_gradient_of_the_head": (
        0, head.backward, (*_GRADIENT, 0.0, True, [True, True, False]), 0,
        "the cut value is the gradient of the head's input",
    ),
    "head_that_is_sliced_already": (
        1, head.backward, (*_GRADIENT, 0.0, True, [False, True, False], torch.tensor(0), 0, 3), 1,
        "the head's gradient is a slice already",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("dim", "target", "args", "result", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_refuses(dim: int, target: Any, args: tuple[Any, ...], result: int | None, reason: str) -> None:
    assert refused(dim, target, *args, result=result).reason == reason

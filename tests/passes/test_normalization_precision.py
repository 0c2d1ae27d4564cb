"""Sunk gradients of normalisations in low precision: what is multiplied and summed is float32, as in the operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.passes.joint import Joint, joint, rewritten

aten = torch.ops.aten
CHANNELS = 96


def layer_norm(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return functional.layer_norm(x, (CHANNELS,), w, b)


def rms_norm(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return functional.rms_norm(x, (CHANNELS,), w) + b


def group_norm(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return functional.group_norm(x, 4, w, b)


def batch_norm(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return functional.batch_norm(x, None, None, w, b, training=True)


KINDS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "layer": (layer_norm, (64, CHANNELS)),
    "rms": (rms_norm, (64, CHANNELS)),
    "group": (group_norm, (4, CHANNELS, 16)),
    "batch": (batch_norm, (8, CHANNELS, 8)),
}


def case(kind: str, dtype: torch.dtype) -> Joint:
    function, sizes = KINDS[kind]
    weight, bias, x = torch.randn(CHANNELS), torch.randn(CHANNELS), torch.randn(sizes)
    return joint(function, [weight.to(dtype), bias.to(dtype)], [x.to(dtype)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("output", [0, 1], ids=["weight", "bias"])
def test_nothing_low_is_multiplied_or_summed(kind: str, dtype: torch.dtype, output: int) -> None:
    asked = (0, 32, 32)
    region = rewritten(case(kind, dtype), *([asked, None] if output == 0 else [None, asked]))
    assert region.dense == []
    dependent = set(region.placeholders("tangent"))
    sums = []
    for node in region.graph.nodes:
        if node.op != "call_function" or not dependent.intersection(node.all_input_nodes):
            continue
        dependent.add(node)
        if node.target is aten.mul.Tensor:
            assert node.meta["val"].dtype == torch.float32, node.format_node()
        if node.target is aten.sum.dim_IntList:
            sums.append(node.all_input_nodes[0].meta["val"].dtype)
    # the bias of rms_norm is added by an operator of its own, whose rule keeps autograd's dtype
    assert sums == [torch.float32] or (kind, output) == ("rms", 1)


@pytest.mark.parametrize("kind", ["group", "batch"])
def test_a_sunk_slice_is_rounded_as_the_whole_gradient_is(kind: str) -> None:
    """Rounded once, at the end, most values are the operator's to the bit; rounded at each product few would be."""
    norm = case(kind, torch.bfloat16)
    found = norm.run(rewritten(norm, (0, 16, 64), None), [16])[1]
    expected = norm.dense()[0].narrow(0, 16, 64)
    assert found.dtype == torch.bfloat16
    assert int((found == expected).sum()) >= 60

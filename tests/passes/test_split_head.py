"""A head takes more, smaller blocks of tokens: every operator of it, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chunkft_fx import passes
from chunkft_fx.graph.region import RegionGraph
from chunkft_fx.head import operators as head
from chunkft_fx.passes.region.split_head import SplitHead
from chunkft_fx.plan.policy import RegionPolicy
from chunkft_fx.program.run_passes import over_region
from tests.passes.joint import Joint, demands, joint

TOKENS, CLASSES, FEATURES = 24, 13, 5


def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    result: Tensor = head.forward(hidden.tanh(), weight, None, labels, -100, 0.0, True)
    return result


def made() -> Joint:
    labels = torch.arange(TOKENS) % CLASSES
    return joint(loss, [torch.randn(TOKENS, FEATURES).double(), torch.randn(CLASSES, FEATURES).double()], [labels])


def splits(region: RegionGraph) -> dict[Any, Any]:
    return {n.target: n.kwargs.get("split", 1) for n in region.graph.nodes if head.is_head(n)}


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(head.SPLITS), st.integers(1, TOKENS), st.booleans())
def test_results_stay_equal_in_smaller_blocks(split: int, tokens: int, is_merged: bool) -> None:
    """Loss and gradients, with the head's operators apart, as they are traced, and as one."""
    case = made()
    region = case.region.copy()
    steps = (
        passes.default_pipeline(demands(["whole", (0, 3, 4)]), RegionPolicy(head_split=split))
        if is_merged
        else (SplitHead(split),)
    )
    over_region(region, steps)
    operators = (head.grad,) if is_merged else (head.forward, head.backward)
    assert splits(region) == dict.fromkeys(operators, split)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "LOGITS_NBYTES", tokens * CLASSES * 8)
        found = case.run(region, [3] if is_merged else [])
    d_hidden, d_weight = case.dense()
    for a, b in zip(found, (case.function(*case.primals), d_hidden, d_weight), strict=True):
        torch.testing.assert_close(a, b[3:7] if is_merged and b is d_weight else b, rtol=1e-9, atol=1e-12)


def test_a_split_of_one_leaves_the_graph_as_it_is() -> None:
    region = made().region.copy()
    before = str(region.graph)
    assert SplitHead(1)(region) == 0
    assert str(region.graph) == before


def test_nothing_but_a_head_is_touched() -> None:
    case = joint(lambda x, w: (x @ w.t()).logsumexp(1).sum(), [torch.randn(4, 3), torch.randn(5, 3)], [])
    region = case.region.copy()
    before = str(region.graph)
    assert SplitHead(8)(region) == 0
    assert str(region.graph) == before

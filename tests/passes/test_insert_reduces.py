"""insert_reduces: each gradient of a parameter goes through one node, behind the call that completes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

import chunkft_fx
from chunkft_fx.errors import VerificationError
from chunkft_fx.graph import ops
from chunkft_fx.passes import InsertReduces
from chunkft_fx.plan.policy import Policy
from chunkft_fx.program.verify_streams import verify_streams
from tests.support.rank_runs import batch, model_of


@pytest.fixture
def written() -> fx.GraphModule:
    """The program of a step on all parameters, with tied weights, before the pass."""
    compiled: Any = chunkft_fx.compile(model_of(0), "1GB", coverage="all", backend="eager")
    inputs: Any = batch(0, 0)
    compiled(**inputs, odd=True).backward()
    module: fx.GraphModule = compiled.program.module
    return module


def gradients(module: fx.GraphModule) -> list[fx.Node]:
    """The gradient outputs of a program."""
    results: Any = module.graph.output_node().args[0]
    return list(results[2])


def test_a_gradient_is_averaged_once_behind_its_last_contribution(written: fx.GraphModule) -> None:
    before = gradients(written)
    names = {n.meta["gradient_of"] for n in before}
    assert len(before) > len(names), "tied weights have two contributions"
    assert InsertReduces()(written) == len(names)
    order = {node: i for i, node in enumerate(written.graph.nodes)}
    after = gradients(written)
    assert [n.meta["gradient_of"] for n in after] == list(dict.fromkeys(n.meta["gradient_of"] for n in before))
    for mean in after:
        assert mean.target is ops.reduce
        own: Any = mean.args[0]
        assert own == [n for n in before if n.meta["gradient_of"] == mean.meta["gradient_of"]]
        calls = [
            n for n in written.graph.find_nodes(op="call_module") if order[max(own, key=order.__getitem__)] < order[n]
        ]
        assert all(order[mean] < order[call] for call in calls)
    verify_streams(written, Policy(ranks=2))


def test_as_operators_means_of_one_rank_are_sums() -> None:
    one, two = torch.rand(2, 3, dtype=torch.bfloat16), torch.rand(2, 3, dtype=torch.bfloat16)
    assert torch.equal(ops.reduce([one, two]), one.float() + two.float())
    assert ops.reduce([one]).dtype == torch.float32


def test_a_contribution_that_others_read_is_caught(written: fx.GraphModule) -> None:
    InsertReduces()(written)
    mean = written.graph.find_nodes(op="call_function", target=ops.reduce)[0]
    with written.graph.inserting_after(mean):
        written.graph.node_copy(mean)
    with pytest.raises(VerificationError, match="which others read"):
        verify_streams(written, Policy(ranks=2))

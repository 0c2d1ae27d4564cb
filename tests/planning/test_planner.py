"""The plan for a batch: fewest chunks, as many saving regions as fit, predictions that follow the budget."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx, nn

import chunkft_fx
from chunkft_fx.errors import BudgetInfeasible
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.predict.region.memory import allocated_peak
from chunkft_fx.tools.zoo import tiny
from tests.runtime.test_full_coverage import Tied
from tests.support.changing_batches import Text, text
from tests.support.equivalence import smallest_budget
from tests.support.forced_splits import unsplit


def planned(
    model: nn.Module, budget: int, batch: dict[str, torch.Tensor], chunks: int | str = "auto"
) -> CompiledModule:
    compiled = chunkft_fx.compile(copy.deepcopy(model), budget, chunks=chunks, backend="eager")
    compiled(**batch)
    return compiled


def test_an_ample_budget_gives_one_chunk_that_saves_everything() -> None:
    model, batch = tiny("llama")
    plan = planned(model, 10**12, batch(2, 16, 0)).plan
    assert len(plan.chunks) == 1
    assert plan.policy.save_from == 0


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_auto_takes_the_fewest_chunks_that_fit(dropout: float) -> None:
    model, batch = tiny("llama", dropout=dropout)
    budget = smallest_budget(model, batch(2, 16, 0)) * 5 // 4
    plan = planned(model, budget, batch(2, 16, 0)).plan
    count = len(plan.chunks)
    assert count > 1
    assert plan.predicted_peak_bytes is not None
    assert plan.predicted_peak_bytes <= budget
    assert len(plan.streamed) == len(dict(model.named_parameters())), "no more could be streamed for fewer chunks"
    with unsplit(), pytest.raises(BudgetInfeasible):
        planned(model, budget, batch(2, 16, 0), chunks=count - 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_larger_budget_never_asks_for_more_chunks_or_more_recomputation(family: str, dropout: float) -> None:
    model, batch = tiny(family, dropout=dropout)
    low = smallest_budget(model, batch(4, 32, 0), chunks=3)
    saving = [planned(model, low * f // 10, batch(4, 32, 0), chunks=3).plan.policy.save_from for f in (10, 11, 13, 20)]
    assert saving == sorted(saving, reverse=True)
    assert saving[0] > saving[-1] == 0


def test_terms_add_up_to_the_predicted_peak() -> None:
    model, batch = tiny("llama", dtype=torch.bfloat16)
    plan = planned(model, 10**12, batch(2, 16, 0), chunks=3).plan
    assert plan.predicted_peak_bytes == sum(nbytes for _, nbytes in plan.terms)
    weights = sum(p.numel() * 2 for p in model.parameters()) + sum(
        b.numel() * b.element_size() for b in model.buffers()
    )
    assert dict(plan.terms)["weights and buffers"] == weights
    elements = max(c.numel for c in plan.chunks)
    assert dict(plan.terms)["gradients of the active chunk"] <= 4 * elements
    assert dict(plan.terms)["optimizer state of the active chunk"] <= 12 * elements


def test_a_larger_batch_than_planned_is_checked_against_the_budget() -> None:
    model, batch = tiny("llama")
    compiled = planned(model, smallest_budget(model, batch(2, 16, 0), chunks=3), batch(2, 16, 0), chunks=3)
    with pytest.raises(BudgetInfeasible, match="too small"):
        compiled(**batch(16, 64, 0))


def traced(function: object, *inputs: torch.Tensor) -> fx.Graph:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode() as mode:
        module = make_fx(function)(*(mode.from_tensor(i) for i in inputs))  # type: ignore[arg-type]
    return module.graph


def test_liveness_counts_a_storage_once_and_frees_it_with_its_last_use() -> None:
    def chain(x: torch.Tensor) -> torch.Tensor:
        a = x + 1  # 400 bytes, with its view
        b = a.view(100) * 2  # 400 more; a dies here
        return b.sum() + (b * 3).sum()  # b and b * 3

    assert allocated_peak(traced(chain, torch.zeros(10, 10))) in range(800, 820)


def test_liveness_does_not_count_views_of_inputs() -> None:
    assert allocated_peak(traced(lambda x: x.t().reshape(100)[:50].sum(), torch.zeros(100, 1))) == 4


@pytest.mark.parametrize("coverage", ["one", "all"])
def test_a_batch_that_does_not_fit_does_so_in_the_micro_batches_that_are_told(coverage: Any) -> None:
    """More chunks are told only where steps have chunks. The batch is one that the library does not split by itself."""
    model, ids = Tied(), torch.zeros(256, 5, dtype=torch.int64)

    def compiled(budget: int | str) -> Any:
        return chunkft_fx.compile(model, budget, chunks=1, coverage=coverage, backend="eager")

    with unsplit(), pytest.raises(BudgetInfeasible) as refused:
        compiled("1kB")(ids)
    assert "model.accumulate" in str(refused.value)
    assert ("use more chunks" in str(refused.value)) == (coverage == "one")
    ours = compiled(refused.value.smallest_budget_bytes - 1)
    with unsplit(), pytest.raises(BudgetInfeasible):
        ours(ids)
    torch.stack(ours.accumulate([(part,) for part in ids.chunk(4)])).sum().backward()


@pytest.mark.parametrize("coverage", ["one", "all"])
def test_micro_batches_fit_the_budget_that_they_are_told(coverage: Any) -> None:
    """What is fewest chunks is counted with what all micro-batches keep."""
    batches = [text(2, 16, seed=s) for s in range(3)]

    def step(budget: int) -> int | None:
        module: Any = chunkft_fx.compile(Text(), budget, coverage=coverage, backend="eager")
        sum(out.loss if hasattr(out, "loss") else out for out in module.accumulate(batches)).backward()
        return module.plan.predicted_peak_bytes

    with pytest.raises(BudgetInfeasible) as refused:
        step(1000)
    enough = refused.value.smallest_budget_bytes
    assert step(enough) == enough
    with pytest.raises(BudgetInfeasible):
        step(enough - 1)

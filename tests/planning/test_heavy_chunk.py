"""Models whose heaviest chunk comes late in the sweep: planned right, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from chunkft_fx.errors import BudgetInfeasible
from chunkft_fx.machine.rates import Rates
from chunkft_fx.plan.plan import Plan
from chunkft_fx.planning.planner import Options, plan_for_batch
from chunkft_fx.predict.fixed_memory import chunk_terms, resident_nbytes, weight_terms
from chunkft_fx.predict.predictor import Predictor
from tests.support.changing_batches import attempt, compiled
from tests.support.forced_splits import unsplit


class Scaled(nn.Module):
    """Small blocks; in one of them the gradient of a small weight takes as much memory as thousands of its elements."""

    def __init__(self, heavy: int, blocks: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(blocks))
        self.scale = nn.ParameterList(nn.Parameter(torch.ones(16)) for _ in range(blocks))
        self.heavy = heavy

    def forward(self, x: Tensor) -> Tensor:
        for i, (layer, scale) in enumerate(zip(self.layers, self.scale, strict=True)):
            x = x + torch.tanh(layer(x))
            # each element of the outer product has a gradient of its own on the way to the scale's
            x = x + torch.sin(x[..., None] * scale * scale).mean(-1) if i == self.heavy else x * scale
        return x.square().mean()


BATCH = {"x": torch.randn(64, 16)}


@pytest.mark.parametrize("heavy", [2, 10])
def test_every_chunk_of_a_sweep_stays_within_the_budget(heavy: int) -> None:
    """Of 21 chunks each is run."""
    model = Scaled(heavy)
    with unsplit(), pytest.raises(BudgetInfeasible) as caught:
        compiled(model, 1, chunks=21)(**BATCH)
    module = compiled(model, caught.value.smallest_budget_bytes, chunks=21)
    for k in range(21):
        module.zero_grad()
        if k:
            module.activate(k)
        assert attempt(module, BATCH)
    assert len(module.plan.chunks) == 21


RATES = Rates({"float32": 5.0e13}, 3.9e12, 5.5e10, 5.5e10, 4.6e10, 7.3)


@pytest.mark.parametrize("heavy", [2, 10])
def test_the_smallest_budget_that_an_error_names_is_enough_for_every_chunk(heavy: int) -> None:
    """Planned as for a GPU, where the number of chunks is chosen by times."""
    model = Scaled(heavy).train()
    module = compiled(model, "1GB", chunks=1)
    module(**BATCH)
    session = module._training.sessions[-1]

    def plan(budget: int) -> Plan:
        options = Options(budget, "auto", "ascending", 1, 0)
        return plan_for_batch(model, options, None, Predictor(session.programs, known=RATES), "this batch")

    with pytest.raises(BudgetInfeasible) as caught:
        plan(1)
    smallest = caught.value.smallest_budget_bytes
    with pytest.raises(BudgetInfeasible):
        plan(smallest - 1)
    made = plan(smallest)
    predictor = Predictor(session.programs, known=RATES)
    largest = max(predictor.peak(chunk, made.policy).nbytes for chunk in made.chunks)
    fixed = {**weight_terms(dict(model.named_parameters()), resident_nbytes(model), session.programs.uses,
        made.streamed, made.policy.depth), **chunk_terms(dict(model.named_parameters()), made.chunks)}  # fmt: skip
    assert made.predicted_peak_bytes is not None
    assert sum(fixed.values()) + largest == made.predicted_peak_bytes <= smallest

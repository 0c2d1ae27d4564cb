"""Models whose heaviest chunk comes late in the sweep: planned right, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.cuts import cut
from chunkft_fx.errors import BudgetInfeasible
from chunkft_fx.planner import parameter_specs
from chunkft_fx.predictor import Predictor
from chunkft_fx.step_cost import Saving
from tests.changing_batches import attempt, compiled


class Scaled(nn.Module):
    """Small blocks; in one of them the gradient of a small weight takes as much memory as thousands of its elements."""

    def __init__(self, heavy: int, blocks: int = 24) -> None:
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


@pytest.mark.parametrize("heavy", [3, 11, 22])
def test_every_chunk_of_a_sweep_stays_within_the_budget(heavy: int) -> None:
    """Of 41 chunks each is run."""
    model = Scaled(heavy)
    with pytest.raises(BudgetInfeasible) as caught:
        compiled(model, 1, chunks=41)(**BATCH)
    module = compiled(model, caught.value.smallest_budget_bytes, chunks=41)
    for k in range(41):
        module.zero_grad()
        if k:
            module.activate(k)
        assert attempt(module, BATCH)
    assert len(module.plan.chunks) == 41


def test_the_chunk_that_needs_most_is_among_those_looked_at() -> None:
    """The peak of no chunk is above that of the lowest of its kind."""
    model = Scaled(17).train()
    module = chunkft_fx.compile(model, "1GB", chunks=1, backend="eager")
    module(**BATCH)
    predictor = Predictor(module._sessions[-1])
    regions = len(predictor.uses())
    for saving in (Saving(0), Saving(regions), Saving(regions // 2, regions // 2)):
        kinds: dict[object, list[tuple[int, int]]] = {}
        for chunk in cut(parameter_specs(model), 60):
            lowest, kind = predictor.kind(chunk, saving)
            kinds.setdefault(kind, []).append((lowest, predictor.peak(chunk, saving).nbytes))
        assert len(kinds) < 60
        for each in kinds.values():
            assert min(each)[1] >= max(nbytes for _, nbytes in each)

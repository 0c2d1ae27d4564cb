"""The sweep over torch's modules finds no fault; `tests.coverage.sweep_modules` writes its whole table."""

from __future__ import annotations

import pytest
import torch

from tests.coverage.sweep_modules import Row, Sample, judge, sweep, table


class Undifferentiable(torch.nn.Module):
    """A module whose compiled form differs from its plain one, as a wrong gradient would."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight @ x * (2 if torch.compiler.is_compiling() else 1)


def test_the_sweep_finds_a_wrong_gradient() -> None:
    sample = Sample(Undifferentiable(), (torch.ones(2, 2, dtype=torch.float64),), {}, torch.float64)
    verdict, reason = judge(sample, 2)
    assert verdict == "FAULT" and "weight" in reason


def test_the_table_counts_every_verdict() -> None:
    row = Row("nn.Odd")
    row.add("right", "")
    row.add("FAULT", "wrong: a | b")
    assert "| `nn.Odd` | 1 |  |  | 1 | wrong: a \\| b |" in table([row])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_module_of_torch_is_trained_wrong_or_refused_without_need() -> None:
    rows = sweep(most=2)
    assert len(rows) > 100
    assert not {row.name: row.reasons["FAULT"] for row in rows if "FAULT" in row.counts}

"""The optimizer's options reach the planner, whether it is made before the first batch or after."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import chunkft_fx
from chunkft_fx.errors import OptionError
from chunkft_fx.plan.state_spec import ASSUMED, StateSpec, StateTensor, spec_of, stage_capacity_nbytes
from tests.support.changing_batches import Text, attempt, compiled, text

STAGED = "optimizer state of the active chunk"


@pytest.mark.parametrize("comes_first", [True, False])
@pytest.mark.parametrize("options", [{"state_dtype": "bfloat16"}, {"states": "reset"}])
def test_what_is_planned_for_states_is_what_the_stage_takes(options: dict[str, Any], comes_first: bool) -> None:
    module = compiled(Text().bfloat16(), "1GB", chunks=3)
    optimizer = chunkft_fx.AdamW(module, **options) if comes_first else None
    assert attempt(module, text(2, 8))
    optimizer = optimizer or chunkft_fx.AdamW(module, **options)
    module.zero_grad()
    assert attempt(module, text(2, 8))
    parameters = dict(module.named_parameters())
    assert dict(module.plan.terms)[STAGED] == max(
        stage_capacity_nbytes(c, parameters, optimizer.spec) for c in module.plan.chunks
    )
    assert module.plan.policy.states == optimizer.spec != ASSUMED
    assert json.loads(module.plan.to_json())["policy"]["states"]["optimizer"] == "AdamW"
    optimizer.step()


def test_states_that_a_sweep_has_begun_with_are_not_planned_for_again() -> None:
    module = compiled(Text().bfloat16(), "1GB", chunks=3)
    attempt(module, text(2, 8))
    plan = module.plan
    optimizer = chunkft_fx.AdamW(module, state_dtype="bfloat16")
    optimizer.step()  # the gradients came before it
    attempt(module, text(2, 8))
    assert module.plan is plan


DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def test_bytes_of_a_spec() -> None:
    assert spec_of(None) == ASSUMED
    assert [ASSUMED.element_nbytes((1, 1), d) for d in DTYPES] == [12, 8, 16]
    narrow = StateSpec("AdamW", (StateTensor("exp_avg", "bfloat16"), StateTensor("exp_avg_sq", "bfloat16")), "reset")
    assert [narrow.element_nbytes((1, 1), d) for d in DTYPES] == [8, 4, 16]
    assert ASSUMED.covers(narrow)
    assert not narrow.covers(ASSUMED)
    assert not narrow.is_kept


def test_states_of_the_whole_belong_to_some_parameters_and_not_to_elements() -> None:
    rows = StateTensor("row", of="matrices", mean_over=-1)
    columns = StateTensor("column", of="matrices", mean_over=-2)
    spec = StateSpec("Factored", (rows, columns, StateTensor("each", of="vectors")), is_whole=True)
    matrix = spec.layouts(torch.empty(3, 5, 7, dtype=torch.bfloat16, device="meta"))
    assert {k: (n.shape, n.dtype, n.is_sliced) for k, n in matrix.items()} == {
        "row": ((3, 5, 1), torch.float32, False),
        "column": ((3, 1, 7), torch.float32, False),
        "master": ((3, 5, 7), torch.float32, True),
    }
    vector = spec.layouts(torch.empty(5, dtype=torch.float64, device="meta"))
    assert {k: (n.shape, n.dtype, n.is_sliced) for k, n in vector.items()} == {"each": ((5,), torch.float64, True)}
    assert [spec.element_nbytes(shape, d) for shape in ((1,), (1, 1)) for d in DTYPES] == [8, 4, 8, 4, 0, 0]
    assert not ASSUMED.covers(spec)  # it needs other chunks
    assert spec.covers(spec)


@pytest.mark.parametrize("nbytes", [("float32",), ("bfloat16", "bfloat16"), ("float32", "bfloat16", "bfloat16")])
def test_a_spec_covers_no_more_tensors_and_no_wider_ones(nbytes: tuple[str, ...]) -> None:
    """Each tensor of a slice is aligned on the stage, so that more tensors of as many bytes can take more."""
    other = StateSpec("Other", tuple(StateTensor(f"s{i}", dtype) for i, dtype in enumerate(nbytes)))
    assert ASSUMED.covers(other) == (len(nbytes) <= 2)


def test_states_of_the_whole_are_refused_where_slices_are_cut() -> None:
    with pytest.raises(OptionError, match="is_whole must be True"):
        StateSpec("Factored", (StateTensor("row", of="matrices", mean_over=-1),))

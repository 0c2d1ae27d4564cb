"""The optimizer's options reach the planner, whether it is made before the first batch or after."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import chunkft_fx
from chunkft_fx.plan.state_policy import ASSUMED, StatePolicy, policy_of
from chunkft_fx.plan.state_spec import stage_capacity_nbytes
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
    dtype = options.get("state_dtype", "float32")
    assert dict(module.plan.terms)[STAGED] == max(
        stage_capacity_nbytes(c, parameters, dtype) for c in module.plan.chunks
    )
    assert module.plan.policy.states == StatePolicy(dtype, options.get("states", "keep"))
    optimizer.step()


def test_states_that_a_sweep_has_begun_with_are_not_planned_for_again() -> None:
    module = compiled(Text().bfloat16(), "1GB", chunks=3)
    attempt(module, text(2, 8))
    plan = module.plan
    optimizer = chunkft_fx.AdamW(module, state_dtype="bfloat16")
    optimizer.step()  # the gradients came before it
    attempt(module, text(2, 8))
    assert module.plan is plan


def test_bytes_of_a_policy() -> None:
    assert policy_of(None) == ASSUMED
    assert [ASSUMED.nbytes(d) for d in (torch.bfloat16, torch.float32, torch.float64)] == [12, 8, 16]
    narrow = StatePolicy("bfloat16", "reset")
    assert [narrow.nbytes(d) for d in (torch.bfloat16, torch.float32, torch.float64)] == [8, 4, 16]
    assert ASSUMED.covers(narrow)
    assert not narrow.covers(ASSUMED)
    assert not narrow.travels

"""Another policy than the planner's: has a compiled module run the steps that a test is about."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from chunkft_fx.module.module import CompiledModule


def force(compiled: CompiledModule, **changes: Any) -> None:
    """Change fields of the policy by which batches that were planned for run; streamed weights stay where they are."""
    plans = compiled._training.sessions[-1].plans
    assert plans._made, "call the module on a batch first"
    plans._made = [replace(m, plan=replace(m.plan, policy=replace(m.plan.policy, **changes))) for m in plans._made]

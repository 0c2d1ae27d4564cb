"""Computes what a trainer's reference model leaves of the budget, and holds the process to both together.

The reference of DPO and its like is a second model, which is only evaluated. It stays the plain model that it is, whole
on the device.
"""

from __future__ import annotations

from typing import Any

from chunkft_fx.bytes import format_bytes, parse_bytes
from chunkft_fx.errors import OptionError
from chunkft_fx.machine.memory_limit import LIMITS
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.predict.fixed_memory import resident_nbytes


def reference_nbytes(trainer: Any) -> int:
    """Bytes of the weights and buffers of the trainer's reference model; 0 without one."""
    reference = getattr(trainer, "ref_model", None)
    return 0 if reference is None else resident_nbytes(reference)


def budget_beside(trainer: Any, budget: str | int) -> int:
    """The bytes of a budget that the reference model leaves; `OptionError` if that is nothing."""
    whole, taken = parse_bytes(budget), reference_nbytes(trainer)
    if taken < whole:
        return whole - taken
    raise OptionError(
        f"the reference model takes {format_bytes(taken)}, which is all of the budget of {format_bytes(whole)}; raise "
        "the budget, or leave ref_model out and set precompute_ref_log_probs=True, so that there is none in training"
    )


def hold_reference(trainer: Any, compiled: CompiledModule) -> None:
    """Let the reference model's bytes be reserved beside the compiled model's budget."""
    taken = reference_nbytes(trainer)
    if taken:
        LIMITS.hold(trainer.ref_model, compiled.residency.device, taken)

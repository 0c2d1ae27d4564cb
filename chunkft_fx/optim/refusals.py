"""Decides which steps an optimizer refuses, each by name, and of what it warns."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from chunkft_fx.errors import (
    ChunkFTWarning,
    DistributedNotSupported,
    NoGradientToScale,
    OptimizerConflict,
    OptionError,
    OutsideGradient,
)
from chunkft_fx.gradients.gate import Arrivals
from chunkft_fx.gradients.slices import ActiveSlice
from chunkft_fx.module.training import Training
from chunkft_fx.optim.states.staging import StagedStates
from chunkft_fx.plan.state_spec import StateSpec
from chunkft_fx.ranks.ranks import Ranks


def refuse_replaced(model: Training, optimizer: object, name: str) -> None:
    """Raise `OptimizerConflict` unless this is the optimizer that the model follows."""
    if model.optimizer is not optimizer:
        raise OptimizerConflict(
            f"another optimizer of chunkft_fx was made for this model after this chunkft_fx.{name}, and the model "
            "follows that one; step the latest, and keep one optimizer for a model"
        )


def refuse_outside(arrivals: Arrivals) -> None:
    """Raise `OutsideGradient` if gradients came, but none through the compiled module."""
    if arrivals.outside and not arrivals.through:
        raise OutsideGradient(
            "parameters have gradients, but none came through the compiled module since the last step: the loss "
            "was computed with the plain model, or with parts of it such as model.base_model and model.lm_head; "
            "call the module that chunkft_fx.compile returned, and take the loss that it returns; TRL's trainers are "
            "given the plain model, and then to chunkft_fx.attach(trainer, budget)"
        )


def refuse_strangers(group: Mapping[str, Any], states: StagedStates) -> None:
    """Raise `OptionError` for a parameter in a group that the compiled module does not train."""
    for i, p in enumerate(group["params"]):
        if not states.holds(p):
            raise OptionError(
                f"param_groups has a tensor of shape {list(p.shape)} (number {i} of its group) which the compiled "
                "module does not train, and which would stay as it is; give it an optimizer of its own"
            )


def refuse_scaling(arrivals: Arrivals, active: Sequence[ActiveSlice]) -> None:
    """Raise `NoGradientToScale` where the batch has no part for the active chunk's slices."""
    if arrivals.through and all(s.grad is None for s in active):
        raise NoGradientToScale(
            f"no gradient reached the active chunk ({', '.join(s.name for s in active[:5])}): its weights have no "
            "part in the loss of this batch, and a gradient scaler cannot step without one; for such a batch call "
            "optimizer.step() itself, and neither scaler.step nor scaler.update: the sweep then moves on "
            "(any(s.grad is not None for s in model.active_slices()) tells); or train in bfloat16, without a scaler"
        )


def refuse_scaled_backward(spec: StateSpec) -> None:
    """Raise `NoGradientToScale` where the backward has used its gradients, scaled as they were."""
    if spec.in_backward:
        raise NoGradientToScale(
            'a gradient scaler was given an optimizer with update="backward": the weights were updated by gradients of '
            'the scaled loss; make the optimizer with update="step", or train in bfloat16, without a scaler'
        )


def warn_without_gradient(active: Sequence[ActiveSlice], warned: set[tuple[str, ...]]) -> None:
    """Warn, once for the same slices, that a step updates nothing; ``warned`` has those that were warned of."""
    names = tuple(s.name for s in active)
    if names in warned:
        return
    warned.add(names)
    warnings.warn(
        f"no gradient reached the active chunk ({', '.join(names[:5])}{' and others' * (len(names) > 5)}): its "
        "weights have no part in the loss of this batch, or were frozen; the step is counted, nothing is updated",
        ChunkFTWarning,
        stacklevel=5,
    )


def refuse_ranks(ranks: Ranks) -> None:
    """Raise `DistributedNotSupported` for a state dict of one of several ranks, which has but a share of the states."""
    if not ranks.is_alone:
        raise DistributedNotSupported(
            f"each of {ranks.size} ranks keeps its share of the optimizer states, and a state_dict of one would lack "
            "the others; save all of them by chunkft_fx.save, which every rank calls"
        )

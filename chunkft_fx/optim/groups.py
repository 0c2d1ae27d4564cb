"""Decides what an optimizer is made from: parameters in groups, checked options, slices that can be updated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from chunkft_fx.errors import NoTrainableParameters, OptimizerMismatch, OptionError
from chunkft_fx.gradients.slices import ActiveSlice
from chunkft_fx.module.training import Training
from chunkft_fx.plan.state_spec import ASSUMED, StateSpec, master_dtype, require_whole
from chunkft_fx.planning.coverage.asked import only_coverage


def check_rate(lr: Any) -> None:
    """Raise `OptionError` for a learning rate out of range.

    The value of a rate that is a tensor on a GPU is not looked at: that would wait for the GPU.
    """
    if not (isinstance(lr, Tensor) and lr.is_cuda) and not is_at_least_0(lr):
        raise OptionError(f"lr={lr!r} must be a number, 0 or more")


def require_at_least_0(options: Mapping[str, Any], *names: str) -> None:
    """Raise `OptionError` unless each of these options is a number, 0 or more."""
    for name in names:
        if not is_at_least_0(options[name]):
            raise OptionError(f"{name}={options[name]!r} must be a number, 0 or more")


def refuse_switches(group: Mapping[str, Any], switches: Sequence[str], optimizer: str) -> None:
    """Raise `OptionError` for an option of a group that only torch's optimizer of this name has."""
    for key in switches:
        if group.get(key):
            raise OptionError(f"{key}={group[key]!r} was set in a parameter group, but {optimizer} has no {key}")


def check_clipping(max_grad_norm: float | None) -> None:
    """Raise `OptionError` unless this is a norm to clip to, or None."""
    if max_grad_norm is not None and not (is_at_least_0(max_grad_norm) and max_grad_norm > 0):
        raise OptionError(f"max_grad_norm={max_grad_norm!r} must be above 0, or None for no clipping")


def require_coverage(model: Training, spec: StateSpec, max_grad_norm: float | None) -> None:
    """Raise `OptionError` for an optimizer that does not go with what a step of the model trains."""
    covers, why = _covered(model)
    if spec.needs_all and covers == "one":
        raise OptionError(
            f'update="{spec.updates}" updates every parameter in every step, but {why}; compile it with '
            'coverage="all", or leave update at "step"'
        )
    if spec.in_backward and max_grad_norm is not None:
        raise OptionError(
            f'max_grad_norm={max_grad_norm!r} needs all gradients before the first update, which update="backward" '
            'does not keep; use update="step" to clip'
        )
    if not spec.is_kept and (covers == "all" or spec.needs_all):
        raise OptionError(
            'states="reset" begins a chunk anew, but with coverage="all" there is one chunk that is always active; '
            'use states="keep", or compile with coverage="one"'
        )
    if not spec.in_backward:
        return
    known = model.residency.parameters  # a walk through the model takes a millisecond, for which a GPU may wait
    half = next((n for n, p in known.items() if p.dtype == torch.float16 and p.requires_grad), None)
    if half is not None:
        raise OptionError(
            f'{half} is float16, which is trained with a scaled loss, and update="backward" cannot take the scale out '
            'of gradients again; use update="step", or convert the model to bfloat16'
        )


def _covered(model: Training) -> tuple[str, str]:
    """What steps of a model cover, as far as that is known without its optimizer ("auto" where it is not), and why."""
    options = model.options
    if options.coverage != "auto":
        return options.coverage, f'the model was compiled with coverage="{options.coverage}"'
    only = only_coverage(options.chunks, options.order, options.interval, ASSUMED)
    if only is not None:
        return only[0], f'the model was compiled with coverage="auto", which is "{only[0]}" because {only[1]}'
    begun = model.begun_coverage
    return ("auto", "") if begun is None else (begun, f'the model is trained with coverage="{begun}" already')


def is_at_least_0(value: Any) -> bool:
    """Whether this is a finite number, or a tensor of one element with such a value, that is 0 or more; NaN is not."""
    is_number = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    return is_number and not isinstance(value, bool) and 0 <= float(value) < float("inf")


def parameter_groups(model: Training, no_decay: Sequence[str]) -> list[dict[str, Any]]:
    """One group with all trainable parameters, and a second without weight decay where patterns ask for it."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise NoTrainableParameters(
            "no parameter of this model has requires_grad=True, so there is nothing to optimize"
        )
    for pattern in no_decay:
        if not any(fnmatchcase(n, pattern) for n, _ in named):
            raise OptionError(f"no_decay pattern {pattern!r} matches no trainable parameter, such as {named[0][0]!r}")
    kept = [(n, p) for n, p in named if any(fnmatchcase(n, pattern) for pattern in no_decay)]
    decayed = [(n, p) for n, p in named if not any(n == k for k, _ in kept)]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def regrouped(
    groups: Sequence[Mapping[str, Any]], parameters: Mapping[str, nn.Parameter], no_decay: Sequence[str]
) -> list[list[str]]:
    """For each group the names that it is to hold, in the model's order: those it has, and new trainable ones.

    New ones that a pattern of ``no_decay`` matches go to the second group where there is one, the others to the first.
    """
    known = {n: i for i, g in enumerate(groups) for n in g["param_names"]}
    members: list[list[str]] = [[] for _ in groups]
    for name, p in parameters.items():
        spared = any(fnmatchcase(name, pattern) for pattern in no_decay)
        if name in known:
            members[known[name]].append(name)
        elif p.requires_grad:
            members[min(int(spared), len(groups) - 1)].append(name)
    return members


def check_slices(
    active: Sequence[ActiveSlice], groups: Sequence[Mapping[str, Any]], device: torch.device, spec: StateSpec
) -> None:
    """Raise `OptimizerMismatch` for what an update on ``device`` could not finish, before it begins."""
    require_whole([s.slice for s in active], spec)
    known = {id(p): n for g in groups for n, p in zip(g["param_names"], g["params"], strict=True)}
    for s in active:
        if known.get(id(s.parameter)) != s.name:
            raise OptimizerMismatch(
                f"{s.name!r} became trainable or was replaced after this optimizer was made; make a new optimizer"
            )
        if s.parameter.device not in (device, torch.device("cpu")):
            raise OptimizerMismatch(
                f"{s.name!r} is on {s.parameter.device}, the model runs on {device}; "
                "a weight must be there or in host memory"
            )
        expected = (s.weight().shape, master_dtype(s.parameter), device)
        if s.grad is not None and (s.grad.shape, s.grad.dtype, s.grad.device) != expected:
            raise OptimizerMismatch(
                f"the gradient of {s.name!r} is {tuple(s.grad.shape)}, {s.grad.dtype} on {s.grad.device}; "
                f"it must be {tuple(expected[0])}, {expected[1]} on {device}"
            )

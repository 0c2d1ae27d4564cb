"""Writes and reads optimizer checkpoints: states are completed for saving, and checked before anything changes.

The layout is that of torch's optimizer of the same name, for AdamW ``{"state": {index: {"step", "exp_avg",
"exp_avg_sq"}}, "param_groups": [...]}``. This library adds ``master`` (float32 weights of low-precision parameters,
in whatever format the optimizer keeps them) and ``slice_steps`` (``[start, length, step]`` along the cut dimension, and
behind them the numbers that the optimizer keeps, if any) per parameter, and a top-level entry ``chunkft`` with names,
shapes and cut dimensions of the parameters, the schedule's position, the learning rates of its sweep
(`optim.sweep_rates`), and the number of updates made, which seeds stochastic rounding. States are in the format in
which the optimizer keeps them, those in 8 bits as ``exp_avg_codes`` (uint8, in the parameter's shape) and
``exp_avg_scales`` (float32, a row for each index of the cut dimension): names that torch's optimizer does not take for
numbers. One that no update reads (``exp_avg`` where ``betas[0]`` is 0) may be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from chunkft_fx.errors import CheckpointMismatch, OptionError
from chunkft_fx.graph.layout import front, size_along
from chunkft_fx.kernels.masters import join_master, reconcile
from chunkft_fx.optim.saved_states import SavedState, checked
from chunkft_fx.optim.states.numbers import Number
from chunkft_fx.optim.states.step_counts import Counts, Run, is_partition, uniform, within
from chunkft_fx.optim.sweep_rates import SweepRates
from chunkft_fx.plan.chunk import ALL, Share
from chunkft_fx.plan.cuts import cut_dim
from chunkft_fx.plan.state_spec import MASTER, REMAINDER, StateSpec, master_dtype

ENTRY = "chunkft"
# Of what stands in that entry; it changes when that does. Version 1 has no rates of a sweep: they begin anew.
VERSION = 2
READABLE = (1, 2)
# Switches of torch's optimizers that choose an implementation; ours is chosen by the device.
_IGNORED_OPTIONS = {"params", "param_names", "foreach", "capturable", "differentiable", "fused"}
# Switches of what is computed, which most optimizers of this library have not; torch's of older versions lack them too.
_SWITCHES = {"decoupled_weight_decay", "amsgrad", "maximize"}


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint: options per group, states by the flat index of the parameter, and the position."""

    options: list[dict[str, Any]]
    states: dict[int, SavedState]
    position: dict[str, Any] | None
    updates: int
    rates: SweepRates


def describe(
    groups: Sequence[Mapping[str, Any]], position: dict[str, Any] | None, updates: int, rates: SweepRates
) -> dict[str, Any]:
    """The entry that this library adds to a checkpoint: plain data only."""
    named = [(n, p) for g in groups for n, p in zip(g["param_names"], g["params"], strict=True)]
    return {
        "version": VERSION,
        "parameters": [[n, list(p.shape), cut_dim(p.shape)] for n, p in named],
        "position": position,
        "updates": updates,
        "rates": rates.state_dict(),
    }


def without_states(groups: Sequence[Mapping[str, Any]], entry: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's groups, with parameters counted over all of them, and its entry: plain data and rates."""
    sizes = [len(g["params"]) for g in groups]
    first = [sum(sizes[:i]) for i in range(len(sizes))]
    packed = [dict(g) | {"params": [*range(f, f + n)]} for g, f, n in zip(groups, first, sizes, strict=True)]
    return {"param_groups": packed, ENTRY: entry}


def fill_masters(states: Mapping[Tensor, Mapping[str, Any]], share: Share = ALL) -> None:
    """Give the masters of slices that were never updated, so far without values, those of the weights.

    Of several ranks each has those of its ``share``.
    """
    for parameter, state in states.items():
        dim = cut_dim(parameter.shape)
        first, length = share.of(size_along(parameter, dim))
        for run in within(state["slice_steps"], first, length) if MASTER in state else ():
            if run.step == 0:
                weight = front(parameter, dim).narrow(0, run.start, run.length)
                reconcile(front(state[MASTER], dim).narrow(0, run.start - first, run.length), weight)


def exported(
    states: Mapping[int, Mapping[str, Any]],
    parameters: Sequence[Tensor],
    spec: StateSpec,
    numbers_of: Callable[[Tensor], tuple[Number, ...]] = lambda _: (),
) -> dict[int, dict[str, Any]]:
    """The states of updated parameters as a checkpoint has them: steps as torch counts them, runs as lists.

    ``numbers_of`` a parameter are those that the optimizer keeps of runs: they stand behind the counts of each, and
    once as torch has them, from the run with most updates.

    Masters that are kept as remainders are put together in host memory, 4 bytes an element while the checkpoint lives.
    """
    found: dict[int, dict[str, Any]] = {}
    for index, state in states.items():
        most = max(state["slice_steps"], key=lambda run: run.step)
        if most.step:
            runs = [list(run) if run.numbers else list(run[:3]) for run in state["slice_steps"]]
            counted = {"step": torch.tensor(float(most.step))} if spec.saves_steps else {}
            numbers = dict(most.numbers)
            counted |= {n.name: n.made(numbers[n.name]) for n in numbers_of(parameters[index])}
            found[index] = {**counted, **_with_master(state, parameters[index]), "slice_steps": runs}
    return found


def _with_master(state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    if REMAINDER not in state:
        return dict(state)
    others = {key: value for key, value in state.items() if key != REMAINDER}
    return {MASTER: join_master(parameter.detach().cpu(), state[REMAINDER]), **others}


class Loads(Protocol):
    """An optimizer, as far as a checkpoint for it is checked; ``defaults`` has the names of what a group sets."""

    spec: StateSpec
    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    switches: tuple[str, ...]

    def numbers_of(self, parameter: Tensor) -> tuple[Number, ...]: ...

    def check_options(self, options: Mapping[str, Any]) -> None: ...

    def unread(self, options: Mapping[str, Any]) -> frozenset[str]: ...


def read(state_dict: Mapping[str, Any], optimizer: Loads) -> Checkpoint:
    """Check a checkpoint of this library, or of torch's optimizer of the same name, against an optimizer.

    Raises `CheckpointMismatch` when the checkpoint belongs to another model, optimizer or layout.
    """
    groups, spec = optimizer.param_groups, replace(optimizer.spec, master="float32")  # as checkpoints have masters
    if not isinstance(state_dict.get("state"), Mapping) or not isinstance(state_dict.get("param_groups"), Sequence):
        raise CheckpointMismatch('this is no optimizer checkpoint: entries "state" and "param_groups" are missing')
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise CheckpointMismatch(
            f"the checkpoint has {len(saved_groups)} parameter group(s), this optimizer {len(groups)}; "
            "make the optimizer with the same no_decay patterns"
        )
    pairs = enumerate(zip(saved_groups, groups, strict=True))
    taken = [_options(i, saved, group, optimizer) for i, (saved, group) in pairs]
    for i, options in enumerate(taken):
        _check_values(i, options, optimizer)
    named = [(n, p) for g in groups for n, p in zip(g["param_names"], g["params"], strict=True)]
    entry = state_dict.get(ENTRY)
    dims = _check_entry(entry, named) if entry is not None else [cut_dim(p.shape) for _, p in named]
    indices = {key: i for i, key in enumerate(k for g in saved_groups for k in g["params"])}
    unknown = [key for key in state_dict["state"] if key not in indices]
    if unknown:
        raise CheckpointMismatch(
            f"the checkpoint has state for parameters {unknown[:5]} that are in none of its groups"
        )
    unread = [optimizer.unread(options) for options, g in zip(taken, groups, strict=True) for _ in g["params"]]
    states = {
        i: _state(*named[i], dims[i], state_dict["state"][key], spec, optimizer.numbers_of(named[i][1]), unread[i])
        for key, i in indices.items()
        if key in state_dict["state"]
    }
    if entry is not None:
        _require_masters([(*named[i], saved) for i, saved in states.items()])
    if entry is None:
        return Checkpoint(taken, states, None, 0, SweepRates())
    rates = SweepRates() if entry["position"] is None else SweepRates.read(entry.get("rates"))
    return Checkpoint(taken, states, entry["position"], int(entry.get("updates", 0)), rates)


def _check_values(index: int, options: Mapping[str, Any], optimizer: Loads) -> None:
    """Refuse options that a group of this optimizer cannot have."""
    try:
        optimizer.check_options(options)
    except OptionError as error:
        raise CheckpointMismatch(f"parameter group {index} of the checkpoint: {error}") from error


def _options(index: int, saved: Mapping[str, Any], group: Mapping[str, Any], optimizer: Loads) -> dict[str, Any]:
    """A saved group's options, once its parameters are known to be this group's."""
    where, name = f"parameter group {index} of the checkpoint", optimizer.spec.optimizer
    optional = (_IGNORED_OPTIONS | _SWITCHES) - {"params"}
    missing = [key for key in ("params", *optimizer.defaults) if key not in saved and key not in optional]
    if missing:
        raise CheckpointMismatch(f"{where} lacks {', '.join(missing)}; it was not saved by an {name} optimizer")
    if len(saved["params"]) != len(group["params"]):
        raise CheckpointMismatch(
            f"{where} has {len(saved['params'])} parameters, the optimizer's has {len(group['params'])}: "
            "it belongs to another model"
        )
    for theirs, ours in zip(saved.get("param_names", ()), group["param_names"], strict=False):
        if theirs != ours:
            raise CheckpointMismatch(f"{where} has parameter {theirs!r} where this model has {ours!r}")
    for switch in ("amsgrad", "maximize"):
        if saved.get(switch) and switch in optimizer.switches:
            raise CheckpointMismatch(f"{where} was trained with {switch}=True, which this optimizer does not do")
    ignored = _IGNORED_OPTIONS | (_SWITCHES - optimizer.defaults.keys())
    return {key: deepcopy(value) for key, value in saved.items() if key not in ignored}


def _check_entry(entry: Any, named: Sequence[tuple[str, Tensor]]) -> list[int]:
    """The saved cut dimensions, once names and shapes are known to be this model's."""
    found = entry.get("version") if isinstance(entry, Mapping) else None
    if isinstance(entry, Mapping) and found not in READABLE:
        raise CheckpointMismatch(
            f"the checkpoint's entry {ENTRY!r} has version {found!r}, and this library reads versions up to {VERSION}: "
            "load it with the release that wrote it, or begin with a new optimizer"
        )
    try:
        saved = [(str(name), tuple(shape), int(dim)) for name, shape, dim in entry["parameters"]]
        entry["position"], int(entry.get("updates", 0))
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise CheckpointMismatch(f"the checkpoint's entry {ENTRY!r} is not readable: {error!r}") from error
    if len(saved) != len(named):
        raise CheckpointMismatch(f"the checkpoint describes {len(saved)} parameters, this model has {len(named)}")
    for (name, shape, _), (ours, parameter) in zip(saved, named, strict=True):
        if (name, shape) != (ours, tuple(parameter.shape)):
            raise CheckpointMismatch(
                f"the checkpoint has parameter {name!r} of shape {shape} where this model has {ours!r} "
                f"of shape {tuple(parameter.shape)}"
            )
    return [dim for _, _, dim in saved]


def _state(
    name: str,
    parameter: Tensor,
    dim: int,
    saved: Mapping[str, Any],
    spec: StateSpec,
    numbers: tuple[Number, ...],
    unread: frozenset[str],
) -> SavedState:
    counts = _counts(name, parameter, dim, saved, spec)
    if numbers:
        counts = tuple(_numbered(name, run, saved, numbers) for run in counts)
        saved = {key: value for key, value in saved.items() if key not in [n.name for n in numbers]}
    return SavedState(checked(name, parameter, dim, saved, spec, unread), counts, dim)


def _numbered(name: str, run: Run, saved: Mapping[str, Any], numbers: tuple[Number, ...]) -> Run:
    """A run with the numbers that were saved behind it or, by torch, once for the parameter."""
    if not run.step:
        return run._replace(numbers=())
    known = {**saved, "step": run.step, **dict(run.numbers)}
    try:
        return run._replace(numbers=tuple((n.name, _number(known[n.name])) for n in numbers))
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointMismatch(f"the numbers of {name!r} are not readable: {error!r}") from error


def _number(value: Any) -> float:
    """A number that was saved as itself or as a tensor."""
    found = value.item() if isinstance(value, Tensor) else value
    if not isinstance(found, int | float):
        raise TypeError(f"{found!r} is no number")
    return found


def _require_masters(states: Sequence[tuple[str, Tensor, SavedState]]) -> None:
    """Where this library trained in low precision it saved a master: without one, the weights were the masters."""
    for name, parameter, saved in states:
        if MASTER not in saved.tensors and master_dtype(parameter) != parameter.dtype:
            raise CheckpointMismatch(
                f"the state of {name!r} has no master weight, but the parameter is {parameter.dtype}: it was trained "
                "in a wider dtype; load into a model of that dtype"
            )


def _counts(name: str, parameter: Tensor, dim: int, saved: Mapping[str, Any], spec: StateSpec) -> Counts:
    """The saved step counts along today's cut dimension."""
    ours = cut_dim(parameter.shape)
    size = size_along(parameter, ours)
    try:
        if "slice_steps" not in saved:
            return _whole(name, saved["step"] if spec.saves_steps else 1, size)
        runs = tuple(_run(*run) for run in saved["slice_steps"])
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointMismatch(f"the step counts of {name!r} are not readable: {error!r}") from error
    if not is_partition(runs, size_along(parameter, dim) if dim < max(parameter.ndim, 1) else -1):
        raise CheckpointMismatch(
            f"the step counts of {name!r} do not cover dimension {dim} of {tuple(parameter.shape)}"
        )
    if spec.is_whole and len(runs) > 1:
        raise CheckpointMismatch(f"{name!r} has several step counts, but {spec.optimizer} updates it as a whole")
    if dim == ours:
        return runs
    if len(runs) > 1:
        raise CheckpointMismatch(f"{name!r} was cut along dimension {dim} when it was saved, now it is along {ours}")
    return uniform(size, runs[0].step, runs[0].numbers)


def _run(start: int, length: int, step: int, numbers: Sequence[tuple[str, float]] = ()) -> Run:
    return Run(start, length, step, tuple((str(name), value) for name, value in numbers))


def _whole(name: str, step: Any, size: int) -> Counts:
    count = float(step)
    if count < 0 or not count.is_integer():
        raise CheckpointMismatch(f"the step count of {name!r} is {count}, not a whole number")
    return uniform(size, int(count))

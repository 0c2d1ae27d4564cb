"""Writes a checkpoint as one of dense training, which transformers' ``Trainer`` resumes with ``torch.optim.AdamW``."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chunkft_fx.checkpoints.dense.trainer import OPTIMIZER, PROGRESS, SCHEDULER, decay_groups, is_dense
from chunkft_fx.checkpoints.disk.folders import RECORD, Target
from chunkft_fx.checkpoints.disk.places import os_failure
from chunkft_fx.checkpoints.load import SavedTraining, find, read
from chunkft_fx.checkpoints.save import EXTRAS
from chunkft_fx.errors import CheckpointMismatch, ChunkFTWarning, OptionError
from chunkft_fx.optim.checkpoint import ENTRY
from chunkft_fx.optim.saved_states import SavedState, floats
from chunkft_fx.optim.states.step_counts import Run
from chunkft_fx.plan.state_spec import CODES, MASTER, SCALES

CONFIG = "config.json"
# The moments of AdamW, and whether they can be below zero.
_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}


def export(folder: Path, target: Path, batch_size: int) -> int:
    """Write the checkpoint in ``folder`` (or the newest there) as one of Trainer's; gives the steps that it has done.

    ``batch_size`` is Trainer's for each device, with which it counts what was read of its data.

    Weights with float32 masters become these, so that nothing is lost; moments become float32. Raises
    `CheckpointMismatch` for a checkpoint that is damaged, of no transformers model, or of another optimizer than AdamW,
    `OptionError` where the target is there already, `SaveFailed`.
    """
    if target.exists():
        raise OptionError(f"{target} is there already; give the path of a folder that is to be made")
    if batch_size < 1:
        raise OptionError(f"batch_size={batch_size!r} must be Trainer's number of samples for each device, 1 or more")
    path = find(folder)
    if is_dense(path):
        raise OptionError(f"{path} is a checkpoint of Trainer's, which resumes from it as it is; nothing was converted")
    found = read(path)
    states, groups = _adamw(found)
    model = _model(found, states)
    optimizer = _dense(model, states, groups, found.path)
    place = Target(target)
    place.begin()
    try:
        model.save_pretrained(place.new)
        for file in found.path.iterdir():
            is_other = file.name.endswith(".safetensors") or file.name in (RECORD, EXTRAS)
            if file.is_file() and not is_other and not (place.new / file.name).exists():
                shutil.copyfile(file, place.new / file.name)
        torch.save(optimizer, place.new / OPTIMIZER)
        if found.scheduler is not None:
            torch.save(dict(found.scheduler), place.new / SCHEDULER)
        _progress(found.step, batch_size, place.new / PROGRESS)
        place.complete()
    except BaseException as error:
        place.abandon()
        failure = os_failure(target, error)
        if failure is not None:
            raise failure from error
        raise
    return found.step


def _adamw(found: SavedTraining) -> tuple[dict[str, SavedState], dict[str, dict[str, Any]]]:
    """The states by the names of their parameters, and the options of each parameter's group."""
    optimizer = found.optimizer
    if not optimizer or any("betas" not in g for g in optimizer["param_groups"]):
        raise CheckpointMismatch(
            f"{found.path} has no states of AdamW; only those can be written for torch.optim.AdamW"
        )
    parameters = optimizer[ENTRY]["parameters"]
    groups = {n: g for g in optimizer["param_groups"] for n in g["param_names"]}
    states = {}
    for index, state in optimizer["state"].items():
        name, _, dim = parameters[index]
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        states[name] = SavedState(tensors, tuple(Run(*run) for run in state["slice_steps"]), dim)
    return states, groups


def _model(found: SavedTraining, states: Mapping[str, SavedState]) -> Any:
    """The model of a checkpoint, in float32 where there are masters, which are its weights then."""
    import transformers

    if not (found.path / CONFIG).is_file():
        raise CheckpointMismatch(
            f"{found.path} has no {CONFIG}: it is of no transformers model, which Trainer could train; "
            "torch.optim.AdamW loads the state_dict() of a float32 chunkft_fx.AdamW as it is"
        )
    config = transformers.AutoConfig.from_pretrained(found.path, local_files_only=True)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        raise CheckpointMismatch(
            f"{found.path / CONFIG} names {config.architectures}, which transformers does not have"
        )
    has_masters = any(MASTER in saved.tensors for saved in states.values())
    dtype = torch.float32 if has_masters else "auto"
    model = kind.from_pretrained(found.path, dtype=dtype, local_files_only=True)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, saved in states.items():
            if MASTER in saved.tensors:
                named[name].copy_(saved.tensors[MASTER])
    return model


def _dense(
    model: nn.Module, states: Mapping[str, SavedState], groups: Mapping[str, Mapping[str, Any]], where: Path
) -> dict[str, Any]:
    """What torch's AdamW of this model has as its state dict, parameters grouped as Trainer does."""
    named = dict(model.named_parameters())
    grouped = decay_groups(model, [n for n in named if n in groups])
    for own in grouped:
        other = next((n for n in own if _options(groups[n]) != _options(groups[own[0]])), None)
        if other is not None:
            raise CheckpointMismatch(
                f"{where} has {own[0]!r} and {other!r} in groups with other options, and Trainer has them in one"
            )
    packed = torch.optim.AdamW([{"params": [named[n] for n in own]} for own in grouped]).state_dict()
    for group, own in zip(packed["param_groups"], grouped, strict=True):
        group |= _options(groups[own[0]]) if own else {}
    order = [n for own in grouped for n in own]
    uneven = [n for n in order if n in states and len({run.step for run in states[n].counts}) > 1]
    if uneven:
        warnings.warn(
            f"parts of {len(uneven)} parameters ({', '.join(uneven[:3])}) had other numbers of updates, and torch's "
            "AdamW counts one for each parameter: it gets the largest",
            ChunkFTWarning,
            stacklevel=3,
        )
    packed["state"] = {i: _moments(states[n], named[n]) for i, n in enumerate(order) if n in states}
    return packed


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _moments(saved: SavedState, parameter: Tensor) -> dict[str, Tensor]:
    """A parameter's state as torch's AdamW has it."""
    found = {"step": torch.tensor(float(max(run.step for run in saved.counts)))}
    for name, is_signed in _MOMENTS.items():
        is_there = saved.tensors.keys() & {name, name + CODES, name + SCALES}
        own = floats(saved, name, is_signed) if is_there else torch.zeros(parameter.shape)
        found[name] = own.to(parameter.dtype).contiguous()
    return found


def _progress(step: int, batch_size: int, file: Path) -> None:
    from transformers import TrainerState

    state = TrainerState(global_step=step, max_steps=step, train_batch_size=batch_size, stateful_callbacks={})
    state.save_to_json(str(file))

"""Reads checkpoints of dense training with ``torch.optim.AdamW``, as transformers' ``Trainer`` saves them.

torch numbers states by the places of parameters in groups. Names are saved only where the optimizer was given them.
Else they are found as Trainer groups parameters: those that decay and those that do not, each in the model's order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chunkft_fx.errors import CheckpointMismatch
from chunkft_fx.optim.checkpoint import ENTRY
from chunkft_fx.optim.optimizer import ChunkedOptimizer

OPTIMIZER, SCHEDULER, PROGRESS = "optimizer.pt", "scheduler.pt", "trainer_state.json"
# Options of a group that say something of its parameters only.
_OF_PARAMETERS = ("params", "param_names")


def is_dense(folder: Path) -> bool:
    """Whether a folder is a checkpoint of Trainer's."""
    return (folder / OPTIMIZER).is_file()


def read_steps(folder: Path) -> int:
    """The optimizer steps that a run of Trainer had done."""
    try:
        return int(json.loads((folder / PROGRESS).read_text())["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointMismatch(f"{folder / PROGRESS} does not say how many steps were done: {error}") from error


def read_file(path: Path) -> Any:
    """What ``torch.save`` wrote, tensors and plain values only, the tensors as the file system holds them."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what is in a file that somebody else wrote fails in as many ways as there are formats
        raise CheckpointMismatch(
            f"{path} is damaged, or holds something other than tensors and plain values, and is not loaded"
        ) from error


def regrouped(saved: Mapping[str, Any], model: nn.Module, optimizer: ChunkedOptimizer, where: Path) -> dict[str, Any]:
    """A state dict of torch's AdamW in the groups of an optimizer of the same parameters.

    Raises `CheckpointMismatch` where it is of other parameters, or one of the groups had several options.
    """
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        raise CheckpointMismatch(f"{where} is no checkpoint of an optimizer")
    names = _names(saved["param_groups"], model, where)
    group_of = {n: group for own, group in zip(names, saved["param_groups"], strict=True) for n in own}
    keys = {
        n: k for own, g in zip(names, saved["param_groups"], strict=True) for n, k in zip(own, g["params"], strict=True)
    }
    wanted = [n for g in optimizer.param_groups for n in g["param_names"]]
    if sorted(wanted) != sorted(keys):
        differ = sorted(set(wanted) ^ set(keys))
        raise CheckpointMismatch(f"{where} is of another model: it differs in {', '.join(differ[:3])}")
    groups = []
    for group in optimizer.param_groups:
        own = group["param_names"]
        options = [{k: v for k, v in group_of[n].items() if k not in _OF_PARAMETERS} for n in own]
        other = next((i for i, o in enumerate(options) if o != options[0]), None)
        if other is not None:
            differ = sorted(k for k in options[0] if options[0][k] != options[other].get(k))
            raise CheckpointMismatch(
                f"{where} has {own[0]!r} and {own[other]!r} in groups with another {', '.join(differ)}, this optimizer "
                "has them in one; make it with no_decay patterns that match the parameters without decay"
            )
        groups.append(options[0] | {"params": [keys[n] for n in own], "param_names": list(own)})
    found = {"state": saved["state"], "param_groups": groups}
    if ENTRY in saved:  # an optimizer of this library in a Trainer: it knows of its sweep, too
        found[ENTRY] = _reordered(saved[ENTRY], wanted)
    return found


def _reordered(entry: Any, names: Sequence[str]) -> Any:
    """What an optimizer of this library says of itself, with its parameters in this order."""
    place = {name: i for i, name in enumerate(names)}
    try:
        return {**entry, "parameters": sorted(entry["parameters"], key=lambda parameter: place[parameter[0]])}
    except (TypeError, KeyError, IndexError):
        return entry  # is refused where it is read


def _names(groups: Sequence[Mapping[str, Any]], model: nn.Module, where: Path) -> list[list[str]]:
    """The names of the parameters in each saved group."""
    if all("param_names" in g for g in groups):
        return [list(g["param_names"]) for g in groups]
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    found = [trained] if len(groups) == 1 else decay_groups(model, trained)
    if [len(g["params"]) for g in groups] != [len(own) for own in found]:
        raise CheckpointMismatch(
            f"{where} has groups of {', '.join(str(len(g['params'])) for g in groups)} parameters, and this model's "
            f"are {', '.join(str(len(own)) for own in found)}: it is of another model, or names are needed, which "
            "torch.optim.AdamW(model.named_parameters()) saves"
        )
    return found


def decay_groups(model: nn.Module, trained: Sequence[str]) -> list[list[str]]:
    """The names of the parameters that Trainer has decay, and of those that it has not."""
    from transformers import Trainer

    decays = set(Trainer.get_decay_parameter_names(None, model))
    return [[n for n in trained if n in decays], [n for n in trained if n not in decays]]

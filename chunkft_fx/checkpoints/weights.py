"""Copies a model's weights, writes them as the model itself does, and reads them back into it."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chunkft_fx.checkpoints.disk.tensor_file import read_tensors, unwritable, write_tensors
from chunkft_fx.errors import CheckpointMismatch, OptionError

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What a model of transformers writes beside its weights.
_SETTINGS = ("config", "generation_config")


class Copies:
    """Copies of tensors in host memory, one for all tensors that are the same memory."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], Tensor] = {}

    def of(self, t: Tensor) -> Tensor:
        """The copy of a tensor; another tensor without memory has one of its own."""
        own = memory_of(t) if t.numel() else (id(t),)
        if own not in self._made:
            self._made[own] = t.detach().to("cpu", copy=True)
        return self._made[own]


def memory_of(t: Tensor) -> tuple[object, ...]:
    """What tells whether two tensors are the same memory, seen alike."""
    return t.device, t.data_ptr(), t.shape, t.stride(), t.dtype


def refuse_unwritable(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Raise `OptionError` for a state dict with something that no file of tensors holds."""
    for name, value in weights.items():
        why = unwritable(name, value) if not _writes_itself(model) or not isinstance(value, Tensor) else None
        if why is not None:
            raise OptionError(
                f"the model's state_dict() has {name!r}, which is {why}, and a checkpoint cannot hold it; "
                "keep it out of the state_dict (a buffer by persistent=False), and save it in extra"
            )


def as_it_is(model: nn.Module) -> nn.Module:
    """The model to be written beside training, with its own copy of settings, which may change meanwhile."""
    if not _writes_itself(model):
        return model
    still = type(model).__new__(type(model))
    still.__dict__.update(model.__dict__)
    still.__dict__.update({name: copy.deepcopy(model.__dict__[name]) for name in _SETTINGS if name in model.__dict__})
    return still


def _writes_itself(model: nn.Module) -> bool:
    write = getattr(model, "save_pretrained", None)
    return write is not None and {"state_dict", "max_shard_size"} <= inspect.signature(write).parameters.keys()


def write_weights(model: Any, weights: Mapping[str, Tensor], folder: Path, shard_nbytes: int) -> None:
    """Write a model's state dict: with ``save_pretrained`` if it has that as transformers' do, else each tensor."""
    if _writes_itself(model):
        model.save_pretrained(folder, state_dict=dict(weights), max_shard_size=shard_nbytes)
        return
    first = {memory_of(t) if t.numel() else (name,): name for name, t in reversed([*weights.items()])}
    write_tensors(folder / FILE, {name: weights[name] for name in sorted(first.values())})


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a saved model; raises `CheckpointMismatch` where there are none."""
    if (folder / FILE).is_file():
        return [folder / FILE]
    try:
        names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    except OSError as error:
        raise CheckpointMismatch(f"{folder} holds no {FILE}") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointMismatch(f"{folder / INDEX} cannot be read") from error
    return [folder / name for name in sorted(names)]


def saved_weights(model: nn.Module, folder: Path) -> Mapping[str, Tensor]:
    """The weights that were saved in a folder, by the names that the model has for them."""
    saved = read_tensors(weight_files(folder))
    if not saved.keys() <= model.state_dict().keys() and hasattr(type(model), "from_pretrained"):
        # transformers keeps some models under other names, or in other pieces, than it runs them
        return _through_transformers(model, folder)
    return saved


def left_out(model: nn.Module) -> frozenset[str]:
    """The names of weights that the model itself never saves, since each model makes the same (sinusoids)."""
    return frozenset(getattr(model, "_keys_to_ignore_on_save", None) or () if _writes_itself(model) else ())


def matched(saved: Any, ours: Mapping[str, Tensor], where: Path, optional: Collection[str] = ()) -> dict[str, Tensor]:
    """Saved weights by all the names of a state dict, tied ones under each of theirs; ``optional`` may be missing.

    Raises `CheckpointMismatch` when names, shapes or dtypes are not this model's.
    """
    if not isinstance(saved, Mapping):
        raise CheckpointMismatch(f"{where} is of another model: it has no weights")
    by_memory = {memory_of(t): name for name, t in ours.items() if t.numel() and name in saved}
    taken = {name: saved.get(by_memory.get(memory_of(t), name)) for name, t in ours.items()}
    missing = [name for name, t in taken.items() if t is None and ours[name].numel() and name not in optional]
    wrong = sorted(saved.keys() - ours.keys()) + missing
    if wrong:
        raise CheckpointMismatch(f"{where} is of another model: it differs in {', '.join(map(str, wrong[:3]))}")
    found = {name: t for name, t in taken.items() if t is not None}
    for name, theirs in found.items():
        if not isinstance(theirs, Tensor) or theirs.shape != ours[name].shape:
            raise CheckpointMismatch(
                f"{where} is of another model: {name} has another shape than {tuple(ours[name].shape)}"
            )
        if theirs.dtype != ours[name].dtype:
            raise CheckpointMismatch(
                f"{where} is of a run in {theirs.dtype}, and this one is in {ours[name].dtype} ({name}); resume with "
                "the same dtype (chunkft train: --dtype)"
            )
    return found


def _through_transformers(model: Any, folder: Path) -> dict[str, Tensor]:
    """The state dict by transformers' own way of reading, which takes memory for all weights."""
    dtype = next(model.parameters()).dtype
    with torch.random.fork_rng():
        return type(model).from_pretrained(folder, dtype=dtype, local_files_only=True).state_dict()

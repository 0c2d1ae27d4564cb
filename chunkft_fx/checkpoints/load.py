"""Reads a checkpoint back into a training, once all of it is known to be whole and to belong there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chunkft_fx.checkpoints.dense.trainer import OPTIMIZER, SCHEDULER, is_dense, read_file, read_steps, regrouped
from chunkft_fx.checkpoints.disk.folders import OLD, RECORD, newest, read_record
from chunkft_fx.checkpoints.disk.sums import check_file
from chunkft_fx.checkpoints.disk.tensor_file import read_tensors
from chunkft_fx.checkpoints.plain import unpacked
from chunkft_fx.checkpoints.random_states import check_random, restore_random
from chunkft_fx.checkpoints.save import EXTRAS, unwrapped
from chunkft_fx.checkpoints.weights import left_out, matched, saved_weights
from chunkft_fx.errors import CheckpointMismatch, OptimizerMismatch
from chunkft_fx.module.module import training_of
from chunkft_fx.optim.checkpoint import ENTRY
from chunkft_fx.optim.optimizer import ChunkedOptimizer


@dataclass(frozen=True)
class Loaded:
    """What was loaded from the folder ``path``: the steps that were done, and the ``extra`` saved with them."""

    path: Path
    step: int
    extra: Any


@dataclass(frozen=True)
class SavedTraining:
    """A checkpoint in the folder ``path`` as it was saved: whole, but not looked at further.

    ``optimizer`` is a state dict, whose tensors lie in files. Where one is None (also ``random``) there was none.
    ``weights`` is the model's, None where files in ``path`` have it. ``random`` is that of rank 0.
    """

    path: Path
    step: int
    optimizer: Mapping[str, Any] | None
    scheduler: Mapping[str, Any] | None
    random: Mapping[str, Any] | None
    extra: Any
    weights: Mapping[str, Tensor] | None = None
    random_of_others: Sequence[Mapping[str, Any]] = ()

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, scheduler: Any) -> None:
        """Continue from here. Raises `CheckpointMismatch`, before anything changes, where that cannot be."""
        training = training_of(model, "load")
        if optimizer is not None and not isinstance(optimizer, ChunkedOptimizer):
            raise OptimizerMismatch(
                f"load was given a {type(optimizer).__qualname__}; give the chunkft_fx optimizer of the model"
            )
        if scheduler is not None and self.scheduler is None:
            raise CheckpointMismatch(f"{self.path} has no state of a scheduler; load it without one")
        if scheduler is not None and self.scheduler is not None:
            _require_same_kind(self.scheduler, scheduler, self.path)
        with training.lock, training.ranks.failing():
            training.ranks.require_same(
                "what is loaded", f"{self.path} at step {self.step}", "load the same on all ranks"
            )
            self._restore(training.plain, optimizer, scheduler, training.ranks.rank)

    def _restore(self, plain: nn.Module, optimizer: ChunkedOptimizer | None, scheduler: Any, rank: int) -> None:
        randoms = [self.random, *self.random_of_others]
        random = randoms[rank] if rank < len(randoms) else None  # a rank that there was not goes on with its own
        saved = self.weights if self.weights is not None else saved_weights(plain, self.path)
        weights = matched(saved, plain.state_dict(), self.path, left_out(plain))
        if random is not None:
            check_random(random, str(self.path))
        try:
            if optimizer is not None:
                if self.optimizer is None:
                    raise CheckpointMismatch(f"{self.path} has no states of an optimizer; load it without one")
                optimizer.load_state_dict(dict(self.optimizer))
            plain.load_state_dict(weights, strict=False)
            if scheduler is not None:
                scheduler.load_state_dict(self.scheduler)
            if random is not None:
                restore_random(random)
        except CheckpointMismatch:
            raise
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise CheckpointMismatch(f"{self.path} is not a checkpoint of this run: {error!r}") from error


def _require_same_kind(saved: Mapping[str, Any], scheduler: Any, where: Path) -> None:
    """Refuse the state of another class of scheduler, which torch's take without looking, and go on wrongly."""
    ours, theirs = ({k for k in state if not str(k).startswith("_")} for state in (scheduler.state_dict(), saved))
    if ours - theirs and theirs - ours:  # another version of torch may have more, or fewer
        raise CheckpointMismatch(
            f"{where} has the state of another scheduler than this {type(scheduler).__name__}: it has "
            f"{', '.join(sorted(theirs - ours))}, and not {', '.join(sorted(ours - theirs))}; make the one that was "
            "saved, or load without one"
        )


def load(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    scheduler: Any = None,
) -> Loaded:
    """Continue a training from a checkpoint that `save` made: ``folder`` is one, or holds several, of which the newest.

    Weights, states, the place in the sweep, the scheduler's state and those of random number generators become what
    they were. Every file is compared with its checksums first, and states are read from the files into their places,
    with no copy of all. Another format of states, or another number of chunks, is what it is for ``load_state_dict``.

    A checkpoint folder of transformers' ``Trainer`` with a ``torch.optim.AdamW`` is loaded as well, whose states go to
    the parameters that they belong to; it has no ``extra``, and random numbers stay as they are.

    Raises `CheckpointMismatch`, before anything changes, where there is no checkpoint, for one that is damaged (with
    the file and the tensor), of another version of the format, or of another model, dtype, optimizer or plan.
    """
    training = training_of(model, "load")
    optimizer = unwrapped(optimizer, training.optimizer)
    path = find(Path(folder))
    found = _read_dense(path, training.plain, optimizer) if is_dense(path) else read(path)
    found.restore(model, optimizer, scheduler)
    return Loaded(found.path, found.step, found.extra)


def _read_dense(path: Path, plain: nn.Module, optimizer: torch.optim.Optimizer | None) -> SavedTraining:
    """Read a checkpoint of Trainer's for an optimizer, into whose groups its states are put."""
    states = None
    if isinstance(optimizer, ChunkedOptimizer):
        states = regrouped(read_file(path / OPTIMIZER), plain, optimizer, path / OPTIMIZER)
    scheduler = read_file(path / SCHEDULER) if (path / SCHEDULER).is_file() else None
    return SavedTraining(path, read_steps(path), states, scheduler, None, None)


def find(folder: Path) -> Path:
    """The checkpoint that a folder is, or the newest in it; raises `CheckpointMismatch` where there is none."""
    if (folder / RECORD).is_file() or is_dense(folder):
        return folder
    found = newest(folder)
    if found is None and (folder / OLD).is_file():
        raise CheckpointMismatch(
            f"{folder / OLD} is in version 1 of the format of checkpoints; go on from it with chunkft train --resume, "
            "which saves in this version"
        )
    if found is None:
        raise CheckpointMismatch(f"there is no checkpoint at {folder}; give a folder that save, or a run, saved one in")
    return found


def read(path: Path) -> SavedTraining:
    """Read a checkpoint and compare it with its checksums; raises `CheckpointMismatch` for one that is damaged."""
    record = read_record(path)
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise CheckpointMismatch(f"{path} says that {step!r} steps were done, which is no count of steps")
    for name, sums in record["files"].items():
        check_file(path / name, sums)
    shards = [path / name for name in sorted(record["files"]) if name.startswith("states-")]
    tensors = read_tensors(shards)
    extras = read_tensors([path / EXTRAS])
    try:
        plain = {key: unpacked(record[key], extras) for key in ("optimizer", "scheduler", "random", "extra", "states")}
        optimizer = plain["optimizer"] | {"state": _states(plain["optimizer"], plain["states"], tensors)}
        others = unpacked(record.get("random_of_others", []), extras)
        return SavedTraining(
            path, step, optimizer, plain["scheduler"], plain["random"], plain["extra"], random_of_others=others
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointMismatch(f"{path / RECORD} does not name what is in its files: {error!r}") from error


def _states(
    optimizer: Mapping[str, Any], described: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[int, dict[str, Any]]:
    """The states of a state dict, by the numbers of their parameters: views of files."""
    found: dict[int, dict[str, Any]] = {}
    parameters = {name: (i, shape, dim) for i, (name, shape, dim) in enumerate(optimizer[ENTRY]["parameters"])}
    for name, own in described.items():
        index, shape, dim = parameters[name]
        kept = {key: (tensors[f"{name}.{key}"], is_turned) for key, is_turned in own["tensors"].items()}
        state = {key: _turned_back(t, shape, dim) if is_turned else t for key, (t, is_turned) in kept.items()}
        found[index] = state | {"slice_steps": own["slice_steps"]}
    return found


def _turned_back(t: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """A view in the shape of the parameter, whose cut dimension is in front."""
    return t.movedim(0, dim) if shape else t.view(())

"""Gathers what a run needs to continue, and puts it back once all of a checkpoint is known to belong to the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkft_fx.errors import CheckpointMismatch
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.optim.rules.adamw import AdamW
from chunkft_fx.tools.training import checkpoint_file
from chunkft_fx.tools.training.data import Batches
from chunkft_fx.tools.training.folder import CHECKPOINT, require_finite
from chunkft_fx.tools.training.options import TrainOptions

# Of the entries of a checkpoint; changes when one of them comes, goes or means something else.
VERSION = 1
_ENTRIES = ("step", "options", "model", "optimizer", "scheduler", "batches", "random", "random_cuda")


@dataclass(frozen=True)
class Run:
    """Everything that changes as a run goes on, and the options it runs under."""

    model: CompiledModule
    optimizer: AdamW
    scheduler: Any
    batches: Batches
    options: TrainOptions

    def save(self, folder: Path, step: int) -> None:
        """Write a checkpoint of a run that has done ``step`` steps; an earlier one is replaced once this is whole.

        Raises `SaveFailed` when it cannot be written and `TrainingDiverged` when weights are not finite numbers;
        an earlier checkpoint then stays.
        """
        path = folder / CHECKPOINT
        require_finite(self.model, f"a checkpoint in {folder} is of before; lower --lr, or check the data")
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "version": VERSION,
            "step": step,
            "options": self.options.lasting(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "batches": self.batches.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all(),
        }
        checkpoint_file.write(path, state)

    def load(self, folder: Path) -> int:
        """Continue from a checkpoint; returns the number of steps done.

        Raises `CheckpointMismatch`, before anything changes, for one that is damaged or of another model, dtype,
        data, options or plan.
        """
        path = require_checkpoint(folder)
        state = checkpoint_file.read(path)
        if state.get("version") != VERSION:
            raise CheckpointMismatch(
                f"{path} is in version {state.get('version')!r} of the format of checkpoints, and this chunkft reads "
                f"version {VERSION}; resume with the chunkft that wrote it, or begin a new run"
            )
        missing = [name for name in _ENTRIES if name not in state]
        if missing:
            raise CheckpointMismatch(f"{path} has no {', '.join(missing)}: no run of chunkft wrote it")
        step = _steps(path, state["step"], self.options.steps)
        _check_options(path, state["options"], self.options)
        _check_weights(path, state["model"], self.model.state_dict())
        random = _check_random(path, state["random"])
        self.batches.load_state_dict(state["batches"])
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.model.load_state_dict(state["model"])
            self.scheduler.load_state_dict(state["scheduler"])
            torch.cuda.set_rng_state_all(state["random_cuda"][: torch.cuda.device_count()])
        except CheckpointMismatch:
            raise
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise CheckpointMismatch(f"{path} is not a checkpoint of this run: {error!r}") from error
        torch.set_rng_state(random)
        return step


def require_checkpoint(folder: Path) -> Path:
    """The checkpoint in a folder; raises `CheckpointMismatch` when there is none."""
    path = folder / CHECKPOINT
    if not path.is_file():
        raise CheckpointMismatch(f"there is no checkpoint at {path}; give the --out folder of a run that saved one")
    return path


def _steps(path: Path, step: Any, steps: int) -> int:
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise CheckpointMismatch(f"{path} says that {step!r} steps were done, which is no count of steps")
    if step > steps:
        raise CheckpointMismatch(f"{path} is of a run that did {step} steps, more than --steps {steps}; give more")
    return step


def _check_options(path: Path, saved: Any, options: TrainOptions) -> None:
    now = options.lasting()
    if not isinstance(saved, Mapping) or saved.keys() != now.keys():
        raise CheckpointMismatch(f"{path} does not name the options of its run: no run of this version wrote it")
    changed = ", ".join(f"{key} {saved[key]} (now {now[key]})" for key in now if saved[key] != now[key])
    if changed:
        raise CheckpointMismatch(f"{path} was saved with {changed}; resume with the same, or begin a new run")


def _check_weights(path: Path, saved: Any, model: Mapping[str, Tensor]) -> None:
    if not isinstance(saved, Mapping) or saved.keys() != model.keys():
        names = sorted(saved.keys() ^ model.keys())[:3] if isinstance(saved, Mapping) else []
        raise CheckpointMismatch(f"{path} is of another model: it differs in {', '.join(map(str, names))}")
    for name, ours in model.items():
        theirs = saved[name]
        if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
            raise CheckpointMismatch(f"{path} is of another model: {name} has another shape than {tuple(ours.shape)}")
        if theirs.dtype != ours.dtype:
            raise CheckpointMismatch(
                f"{path} is of a run in {theirs.dtype}, and this one is in {ours.dtype} ({name}); resume with the "
                "same --dtype"
            )


def _check_random(path: Path, state: Any) -> Tensor:
    ours = torch.get_rng_state()
    if not isinstance(state, Tensor) or state.shape != ours.shape or state.dtype != ours.dtype:
        raise CheckpointMismatch(f"{path} has no state of torch's random numbers: no run of chunkft wrote it")
    return state

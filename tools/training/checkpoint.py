"""Writes a run so that it can go on, and puts it back once all of a checkpoint is known to belong to the run."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from chunkft_fx.checkpoints.disk.folders import OLD, newest
from chunkft_fx.checkpoints.load import read
from chunkft_fx.checkpoints.save import save
from chunkft_fx.checkpoints.saving import wait_for_saves
from chunkft_fx.errors import CheckpointMismatch, ChunkFTWarning, SaveFailed
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.optim.optimizer import ChunkedOptimizer
from chunkft_fx.tools.changes.wanted import ModelChanges
from chunkft_fx.tools.training.checkpoint_file import read_old
from chunkft_fx.tools.training.data import Batches
from chunkft_fx.tools.training.folder import require_finite
from chunkft_fx.tools.training.options import TrainOptions

Given = ParamSpec("Given")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Run:
    """Everything that changes as a run goes on, and the options it runs under.

    Checkpoints have the ``tokenizer``, too. The last ``keep`` of them stay.
    """

    model: CompiledModule
    optimizer: ChunkedOptimizer
    scheduler: Any
    batches: Batches
    options: TrainOptions
    tokenizer: Any = None
    keep: int = 2
    _saved: dict[int, Path] = field(default_factory=dict)

    def save(self, folder: Path, step: int, *, best: int | None = None, wait: bool = False) -> Path:
        """Save a run that has done ``step`` steps; gives the folder that has it, once it is on the disk.

        Training goes on meanwhile unless it is to ``wait``, and after the last step. The checkpoint of step ``best``
        stays as well. Raises `SaveFailed` when it, or the one before, cannot be written, and `TrainingDiverged` when
        weights are not finite numbers; earlier checkpoints then stay.
        """
        wait = wait or step == self.options.steps
        if step in self._saved and wait:  # it may be told to stop right behind a save
            wait_for_saves()
            return self._saved[step]
        require_finite(self.model, f"a checkpoint in {folder} is of before; lower --lr, or check the data")
        self._saved[step] = save(
            folder,
            self.model,
            self.optimizer,
            step,
            scheduler=self.scheduler,
            tokenizer=self.tokenizer,
            extra={"options": self.options.lasting(), "batches": self.batches.state_dict()},
            keep=self.keep,
            best=best,
            wait=wait,
        )
        return self._saved[step]

    def load(self, folder: Path) -> int:
        """Continue from the newest checkpoint in a folder; returns the number of steps done.

        Raises `CheckpointMismatch`, before anything changes, for one that is damaged or of another model, dtype,
        data, options or plan.
        """
        path = require_checkpoint(folder)
        found = read_old(path) if path.is_file() else read(path)
        extra = found.extra
        missing = [name for name in ("options", "batches") if not isinstance(extra, Mapping) or name not in extra]
        if missing:
            raise CheckpointMismatch(f"{path} has no {', '.join(missing)}: no run of chunkft wrote it")
        step = _steps(path, found.step, self.options.steps)
        _check_options(path, extra["options"], self.options)
        before = self.batches.position
        self.batches.load_state_dict(extra["batches"])
        try:
            found.restore(self.model, self.optimizer, self.scheduler)
        except CheckpointMismatch:
            self.batches.position = before
            raise
        return step


def saves_finished(call: Callable[Given, Result]) -> Callable[Given, Result]:
    """A function after which, whatever it ends with, all checkpoints are on the disk; raises `SaveFailed` if not."""

    @functools.wraps(call)
    def finished(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        try:
            result = call(*args, **kwargs)
        except BaseException:
            try:
                wait_for_saves()
            except SaveFailed as error:  # beside what it ended with, which matters more
                warnings.warn(str(error), ChunkFTWarning, stacklevel=2)
            raise
        wait_for_saves()
        return result

    return finished


def require_checkpoint(folder: Path) -> Path:
    """The newest checkpoint in a folder; raises `CheckpointMismatch` when there is none."""
    path = newest_checkpoint(folder)
    if path is None:
        raise CheckpointMismatch(f"there is no checkpoint at {folder}; give the --out folder of a run that saved one")
    return path


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a folder, which may be a file of an earlier version; None when there is none."""
    old = folder / OLD
    return newest(folder) or (old if old.is_file() else None)


def _steps(path: Path, step: Any, steps: int) -> int:
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise CheckpointMismatch(f"{path} says that {step!r} steps were done, which is no count of steps")
    if step > steps:
        raise CheckpointMismatch(f"{path} is of a run that did {step} steps, more than --steps {steps}; give more")
    return step


def _check_options(path: Path, saved: Any, options: TrainOptions) -> None:
    now = options.lasting()
    if isinstance(saved, Mapping):  # a run of before an option was there had what is its default now
        saved = {**ModelChanges().lasting(), **saved}
    if not isinstance(saved, Mapping) or saved.keys() != now.keys():
        raise CheckpointMismatch(f"{path} does not name the options of its run: no run of this version wrote it")
    changed = ", ".join(f"{key} {saved[key]} (now {now[key]})" for key in now if saved[key] != now[key])
    if changed:
        raise CheckpointMismatch(f"{path} was saved with {changed}; resume with the same, or begin a new run")

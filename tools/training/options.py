"""Checks the options of a training run before a model is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from chunkft_fx.bytes import parse_bytes
from chunkft_fx.errors import OptionError
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.plan.schedule import ChunkSchedule, check_interval
from chunkft_fx.plan.state_spec import MASTERS, STATE_DTYPES, UPDATES
from chunkft_fx.planning.coverage.asked import check_coverage
from chunkft_fx.planning.planner import BACKENDS
from chunkft_fx.tools.changes.wanted import ModelChanges
from chunkft_fx.tools.models.tasks import check_task
from chunkft_fx.tools.setup.optimizers import check_optimizer, make_optimizer

# The data order multiplies the seed, and torch's generators take 64 bits.
MAX_SEED = 2**32 - 1
_LEAST = {"steps": 1, "batch_size": 1, "accumulate": 1, "patience": 0}
# Counts of steps, or below 1 shares of all.
_SHARES = ("warmup", "save_every", "eval_every")


@dataclass(frozen=True)
class TrainOptions:
    """What a run does; ``steps`` counts optimizer steps, each over ``accumulate`` batches of ``batch_size``.

    ``schedule`` is a name that ``transformers.get_scheduler`` knows, ``schedule_options`` its own arguments.
    ``warmup``, ``save_every`` (0 writes no checkpoints) and ``eval_every`` (0 scores once an epoch) are in optimizer
    steps, or below 1 shares of all (`counted`). ``update``, ``master`` and ``state_dtype`` are those of
    `chunkft_fx.AdamW`: when weights change, how float32 masters of bfloat16 weights are kept, and moments.
    ``optimizer`` is a name that `chunkft_fx.tools.setup.optimizers` knows, ``optimizer_options`` its own arguments.
    ``task`` is what the model is trained for. Without ``shuffle`` each epoch has the rows in the order of the data.
    ``patience`` is how many scores in a row may be no better than the best before training ends; 0 trains on.
    ``changes`` are those of the model before it is trained.
    Raises `OptionError` for a value out of range.
    """

    steps: int
    batch_size: int = 1
    accumulate: int = 1
    lr: float = 1e-5
    schedule: str = "cosine"
    schedule_options: Mapping[str, Any] = field(default_factory=dict)
    warmup: float = 0
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    seed: int = 0
    save_every: float = 0
    update: str = "step"
    master: str = "float32"
    state_dtype: str = "float32"
    optimizer: str = "adamw"
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    task: str = "causal"
    eval_every: float = 0
    shuffle: bool = True
    patience: int = 0
    changes: ModelChanges = field(default_factory=ModelChanges)

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            at_least(name, getattr(self, name), least)
        check_task(self.task)
        check_optimizer(self.optimizer, self.optimizer_options, self.formats, self.weight_decay)
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise OptionError(f"{name.replace('_', '-')} is {value}; it must be a finite number, 0 or more")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise OptionError(f"max-grad-norm is {self.max_grad_norm}; it must be above 0, or 0 to not clip")
        for name in _SHARES:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0) or (value > 1 and value % 1):
                raise OptionError(
                    f"{name.replace('_', '-')} is {value}; it must be 0 or more steps, or a share of all steps below 1"
                )
        if self.warmup > self.steps:
            raise OptionError(f"warmup is {self.warmup}, more than all {self.steps} steps: lr would never be reached")
        for name, known in {"update": UPDATES, "master": MASTERS, "state_dtype": STATE_DTYPES}.items():
            if getattr(self, name) not in known:
                shown = name.replace("_", "-")
                raise OptionError(f"{shown} is {getattr(self, name)}; it must be one of {', '.join(known)}")
        if self.update == "backward" and self.max_grad_norm is not None:
            raise OptionError(
                f"max-grad-norm is {self.max_grad_norm}, but with update=backward no step has all gradients to clip; "
                "give --max-grad-norm 0, or --update step"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise OptionError(f"seed is {self.seed}; it must be from 0 to {MAX_SEED}")

    def counted(self, given: float) -> int:
        """Optimizer steps that are given as a number, or below 1 as a share of all."""
        return math.ceil(given * self.steps) if given < 1 else int(given)

    @property
    def formats(self) -> dict[str, str]:
        """The formats of an optimizer's states, where it has a choice."""
        return {"master": self.master, "state_dtype": self.state_dtype}

    def make_optimizer(self, model: CompiledModule, **more: Any) -> Any:
        """The optimizer of a run over its compiled model; ``more`` are arguments that every optimizer takes."""
        return make_optimizer(
            model,
            self.optimizer,
            self.optimizer_options,
            self.formats,
            lr=self.lr,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            update=self.update,
            **more,
        )

    def lasting(self) -> dict[str, Any]:
        """What must be the same when a run is resumed: all but when it ends and how often it saves."""
        kept = ("accumulate", "lr", "schedule", "warmup", "weight_decay", "max_grad_norm", "optimizer", "task")
        tables = {name: dict(getattr(self, name)) for name in ("schedule_options", "optimizer_options")}
        return {name: getattr(self, name) for name in kept} | tables | self.changes.lasting()


def at_least(name: str, value: int, least: int) -> None:
    """Raise `OptionError` for a count below ``least``; the message names the option as on the command line."""
    if value < least:
        raise OptionError(f"{name.replace('_', '-')} is {value}; it must be {least} or more")


def chunk_count(chunks: str) -> int | str:
    """``"auto"`` or a number from 1 on; raises `OptionError` for anything else."""
    if chunks == "auto":
        return chunks
    if not chunks.isdecimal() or int(chunks) < 1:
        raise OptionError(f'chunks={chunks!r} is not known; give a number, 1 or more, or "auto"')
    return int(chunks)


def turn_steps(interval: str) -> int | str:
    """``"auto"`` or a number from 1 on; raises `OptionError` for anything else."""
    given = int(interval) if interval.isdecimal() else interval
    check_interval(given)
    return given


def check_compile_options(
    budget: str, order: str, interval: int | str, backend: str, coverage: str = "one", chunks: int | str = "auto"
) -> None:
    """Raise what `chunkft_fx.compile` would raise for these options, before there is a model to call it with."""
    parse_bytes(budget)
    ChunkSchedule(1, order)
    check_interval(interval)
    check_coverage(coverage, chunks)
    if backend not in BACKENDS:
        raise OptionError(f"backend={backend!r} is not known; choose one of {', '.join(BACKENDS)}")


def check_update(update: str, coverage: str, chunks: int | str, order: str, interval: int | str) -> None:
    """Raise `OptionError` for updates that need all parameters in a step, beside options that leave it one chunk."""
    if update == "step" or coverage == "all":
        return
    needed = f"update={update} updates all parameters in every step"
    if coverage == "one":
        raise OptionError(f"{needed}; give --coverage all with it")
    for name, value, usual in (
        ("chunks", chunks, "auto"),
        ("order", order, "ascending"),
        ("interval", interval, "auto"),
    ):
        if value != usual:
            raise OptionError(f"{needed}, and --{name} {value} leaves it one chunk; leave out one of them")


def json_object(text: str) -> dict[str, Any]:
    """A JSON object given on the command line."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise OptionError(f'{text!r} is not a JSON object such as {{"num_cycles": 2}}')
    return value

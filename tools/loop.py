"""The training loop of the tools: batches in, updated weights out, checkpoints on the way."""

from __future__ import annotations

import inspect
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkft_fx.errors import CheckpointMismatch, OptionError
from chunkft_fx.module import CompiledModule
from chunkft_fx.optim import AdamW
from chunkft_fx.tools.data import Batches

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class TrainOptions:
    """What a run does; ``steps`` counts optimizer steps, each over ``accumulate`` batches of ``batch_size``.

    ``schedule`` is a name that ``transformers.get_scheduler`` knows, ``schedule_options`` its own arguments.
    ``save_every`` is in optimizer steps; 0 writes no checkpoints.
    """

    steps: int
    batch_size: int = 1
    accumulate: int = 1
    lr: float = 1e-5
    schedule: str = "cosine"
    schedule_options: Mapping[str, Any] = field(default_factory=dict)
    warmup: int = 0
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    seed: int = 0
    save_every: int = 0

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "batch_size": 1, "accumulate": 1, "warmup": 0, "save_every": 0}.items():
            if getattr(self, name) < least:
                raise OptionError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be {least} or more")


@dataclass(frozen=True)
class StepInfo:
    """What there is to say after an optimizer step: ``chunk`` is the one that was updated, ``lr`` the rate used."""

    step: int
    loss: float
    chunk: int
    lr: float
    tokens_per_s: float
    peak_nbytes: int


@dataclass(frozen=True)
class TrainReport:
    """A finished run: the loss of each step, wall-clock seconds, tokens seen, and the peak of memory."""

    losses: tuple[float, ...]
    seconds: float
    tokens: int
    peak_nbytes: int


def train(
    model: CompiledModule,
    sequences: Tensor,
    options: TrainOptions,
    *,
    on_step: Callable[[StepInfo], None] = lambda _: None,
    out: Path | None = None,
    resume: Path | None = None,
) -> TrainReport:
    """Train a compiled causal language model on ``sequences`` (``i64[count, length]``) with AdamW.

    ``out`` is the folder for checkpoints, ``resume`` a folder with one: the run then continues at its
    step, as if it had never stopped. Raises `OptionError` for a schedule that does not exist, `DataError`
    for too few sequences, `CheckpointMismatch` for a checkpoint of another model or other data.
    """
    if options.save_every and out is None:
        raise OptionError("checkpoints were asked for, but there is no folder to write them to; set out")
    device = next(model.parameters()).device
    torch.manual_seed(options.seed)
    optimizer = AdamW(model, lr=options.lr, weight_decay=options.weight_decay, max_grad_norm=options.max_grad_norm)
    scheduler = make_scheduler(optimizer, options)
    batches = Batches(sequences, options.batch_size, options.seed)
    first = 0 if resume is None else load_checkpoint(resume, model, optimizer, scheduler, batches)
    losses: list[float] = []
    model.train()
    begin = last = time.perf_counter()
    for step in range(first, options.steps):
        loss = torch.zeros((), device=device)
        for _ in range(options.accumulate):
            ids = next(batches).to(device)
            part = model(input_ids=ids, labels=ids, use_cache=False).loss / options.accumulate
            part.backward()
            loss += part.detach()
        chunk, lr = model.chunk, float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        _advance(scheduler, losses[-1])
        now = time.perf_counter()
        rate = options.accumulate * options.batch_size * sequences.shape[1] / (now - last)
        last = now
        on_step(StepInfo(step + 1, losses[-1], chunk, lr, rate, peak_nbytes(device)))
        if out is not None and options.save_every and (step + 1) % options.save_every == 0:
            save_checkpoint(out, model, optimizer, scheduler, batches, step + 1)
    tokens = len(losses) * options.accumulate * options.batch_size * sequences.shape[1]
    return TrainReport(tuple(losses), time.perf_counter() - begin, tokens, peak_nbytes(device))


def make_scheduler(optimizer: AdamW, options: TrainOptions) -> Any:
    """A learning-rate scheduler of transformers, stepped once an optimizer step."""
    from transformers import get_scheduler

    try:
        return get_scheduler(
            options.schedule,
            optimizer,
            num_warmup_steps=options.warmup,
            num_training_steps=options.steps,
            scheduler_specific_kwargs=dict(options.schedule_options),
        )
    except (ValueError, TypeError) as error:
        raise OptionError(f"schedule {options.schedule!r} with {dict(options.schedule_options)}: {error}") from error


def _advance(scheduler: Any, loss: float) -> None:
    """Some schedules react to the loss and take it as an argument."""
    if "metrics" in inspect.signature(scheduler.step).parameters:
        scheduler.step(loss)
    else:
        scheduler.step()


@torch.no_grad()
def evaluate(model: CompiledModule, sequences: Tensor, batch_size: int) -> float:
    """The mean loss over all of ``sequences`` (``i64[count, length]``); training mode is restored after."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    for batch in sequences.split(batch_size):
        ids = batch.to(device)
        total += float(model(input_ids=ids, labels=ids, use_cache=False).loss) * len(batch)
    model.train(was_training)
    return total / len(sequences)


def save_checkpoint(
    folder: Path, model: CompiledModule, optimizer: AdamW, scheduler: Any, batches: Batches, step: int
) -> None:
    """Write all that a run needs to continue into ``folder``; an earlier checkpoint is replaced once this is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "batches": batches.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all(),
    }
    unfinished = folder / f"{CHECKPOINT}.unfinished"
    torch.save(state, unfinished)
    os.replace(unfinished, folder / CHECKPOINT)


def load_checkpoint(folder: Path, model: CompiledModule, optimizer: AdamW, scheduler: Any, batches: Batches) -> int:
    """Continue from a checkpoint; returns the number of steps done. Raises `CheckpointMismatch`."""
    path = folder / CHECKPOINT
    if not path.is_file():
        raise CheckpointMismatch(f"there is no checkpoint at {path}; give the --out folder of a run with --save-every")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        batches.load_state_dict(state["batches"])
        optimizer.load_state_dict(state["optimizer"])
        model.load_state_dict(state["model"])
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"])
        torch.cuda.set_rng_state_all(state["random_cuda"][: torch.cuda.device_count()])
        return int(state["step"])
    except CheckpointMismatch:
        raise
    except Exception as error:  # an unreadable file fails in as many ways as there are formats
        raise CheckpointMismatch(f"{path} is not a checkpoint of this model: {error}") from error


def peak_nbytes(device: torch.device) -> int:
    """The most bytes that were held at once: reserved on the CUDA device, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

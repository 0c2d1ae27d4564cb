"""Runs training for the tools: batches in, updated weights out, checkpoints on the way."""

from __future__ import annotations

import inspect
import math
import resource
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkft_fx.errors import ChunkFTWarning, OptionError, TrainingDiverged
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.plan.plan import Plan
from chunkft_fx.tools.data.rows import Rows, Sequences, learned_count
from chunkft_fx.tools.models.evaluate import Score, evaluate
from chunkft_fx.tools.models.tasks import call_options
from chunkft_fx.tools.training.checkpoint import Run, saves_finished
from chunkft_fx.tools.training.data import Batches
from chunkft_fx.tools.training.options import TrainOptions
from chunkft_fx.tools.training.signals import Stopped


@dataclass(frozen=True)
class StepInfo:
    """What there is to say after an optimizer step: ``chunk`` is the one that was updated, ``lr`` the rate used.

    ``grad_norm`` is the norm before clipping, where there is clipping.
    """

    step: int
    loss: float
    chunk: int
    lr: float
    tokens_per_s: float
    peak_nbytes: int
    epoch: float = 0.0
    grad_norm: float | None = None


@dataclass(frozen=True)
class TrainReport:
    """A finished run: the loss of each step, seconds, tokens seen, the peak of memory, and the step it ended at."""

    losses: tuple[float, ...]
    seconds: float
    tokens: int
    peak_nbytes: int
    ended: int = 0


@saves_finished
def train(
    model: CompiledModule,
    data: Rows | Tensor,
    options: TrainOptions,
    *,
    on_step: Callable[[StepInfo], None] = lambda _: None,
    held_out: Rows | None = None,
    on_score: Callable[[int, Score], None] = lambda step, score: None,
    on_resume: Callable[[int], None] = lambda _: None,
    out: Path | None = None,
    resume: Path | None = None,
    tokenizer: Any = None,
    keep: int = 2,
    stop: Callable[[], int | None] = lambda: None,
    enough: Callable[[int], bool] = lambda _: False,
) -> TrainReport:
    """Train a compiled model on ``data``: rows, or sequences in memory (``i64[count, length]``).

    The model is scored on ``held_out``, as often as the options say and after the last step. ``out`` is the folder for
    checkpoints, which have the ``tokenizer`` and of which the last ``keep`` stay; they are written while training goes
    on, and there when this returns. ``resume`` is a folder with one: the run then continues at its step, as if it had
    never stopped, after ``on_resume`` was told which. ``stop`` is asked after each step: given the number of a signal,
    the run is saved in ``out`` and `Stopped` raised, unless that step was the last. ``enough`` is asked for a number of
    steps that were done, scores among them, whether training ends there. Raises `OptionError` for a schedule
    that does not exist, `DataError` for too few sequences, `CheckpointMismatch` for a checkpoint of another run or a
    damaged one, `TrainingDiverged`, with the latest checkpoint as it was, for a loss or weights that are not finite
    numbers.
    """
    if options.save_every and out is None:
        raise OptionError("checkpoints were asked for, but there is no folder to write them to; set out")
    rows = Sequences(data) if isinstance(data, Tensor) else data
    device = next(model.parameters()).device
    torch.manual_seed(options.seed)
    optimizer = options.make_optimizer(model)
    scheduler = make_scheduler(optimizer, options)
    batches = Batches(rows, options.batch_size, options.seed, options.shuffle)
    run = Run(model, optimizer, scheduler, batches, options, tokenizer, keep)
    first = 0 if resume is None else run.load(resume)
    if resume is not None:
        on_resume(first)
    scored_every, saved_every = scoring_interval(options, rows), options.counted(options.save_every)
    step_tokens = options.accumulate * options.batch_size * rows.length
    losses: list[float] = []
    model.train()
    begin = last = time.perf_counter()
    for step in range(first, options.steps):
        if enough(step):
            break
        loss = float(_backward(run, device))
        _require_finite(loss, step + 1)
        if step == first:
            _warn_of_short_run(model.plan, options.steps)
        chunk = model.chunk
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        _advance(scheduler, loss)
        now = time.perf_counter()
        rate, epoch = step_tokens / (now - last), batches.position / batches.in_epoch
        norm = None if optimizer.last_grad_norm is None else float(optimizer.last_grad_norm)
        on_step(StepInfo(step + 1, loss, chunk, float(optimizer.last_rates[0]), rate, peak_nbytes(device), epoch, norm))
        is_last = step + 1 == options.steps
        if held_out is not None and ((step + 1) % scored_every == 0 or is_last):
            on_score(step + 1, evaluate(model, held_out, options.batch_size, options.task))
            is_last = is_last or enough(step + 1)
        if out is not None and saved_every and ((step + 1) % saved_every == 0 or is_last):
            run.save(out, step + 1)
        signal = None if is_last else stop()
        if signal is not None:
            raise _stopped(signal, run, out, step + 1)
        # scores and checkpoints are no part of a step's time
        last = time.perf_counter()
    seconds, done = time.perf_counter() - begin, len(losses)
    return TrainReport(tuple(losses), seconds, done * step_tokens, peak_nbytes(device), first + done)


def scoring_interval(options: TrainOptions, rows: Rows) -> int:
    """Optimizer steps between scores: as the options say, or once an epoch."""
    in_epoch = len(rows) // options.batch_size
    return options.counted(options.eval_every) or max(1, in_epoch // options.accumulate)


def _backward(run: Run, device: torch.device) -> Tensor:
    """Give the active chunk the gradients of one optimizer step, or update it by them; returns the mean loss.

    It is the mean over all labels of the step, of which its batches may have uneven numbers.
    """
    options = run.options
    batches = [next(run.batches) for _ in range(options.accumulate)]
    counts = [learned_count(batch, shifted=options.task == "causal") for batch in batches]
    more = call_options(run.model, options.task)
    total = torch.zeros((), device=device)
    for i, (batch, count) in enumerate(zip(batches, counts, strict=True)):
        is_last = i + 1 == len(batches)
        with nullcontext() if is_last else run.model.no_sync():
            loss = run.model(**{name: t.to(device) for name, t in batch.items()}, **more).loss
            part = loss * (count / sum(counts))
            part.backward()
        total += part.detach()
    return total


def _warn_of_short_run(plan: Plan, steps: int) -> None:
    """Say with a `ChunkFTWarning` that a run ends before the first sweep does."""
    fewest, _ = plan.updates_in(steps)
    if fewest:
        return
    turn = 1 if plan.warms_up else plan.interval
    reached, shorter = math.ceil(steps / turn), "" if turn == 1 else " or a shorter interval"
    warnings.warn(
        f"{steps} steps train {reached} of {len(plan.chunks)} chunks, the other weights stay as they are: the first "
        f"sweep takes {turn * len(plan.chunks)} steps (of {turn} a chunk); train longer, or give fewer chunks{shorter}",
        ChunkFTWarning,
        stacklevel=3,
    )


def _require_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise TrainingDiverged(
            f"the loss of step {step} is {loss}, and the run stops: what was saved before is as it was; lower --lr, "
            "raise --warmup, or check the data"
        )


def _stopped(signal: int, run: Run, out: Path | None, step: int) -> Stopped:
    done = f"after step {step} of {run.options.steps}"
    if out is None:
        return Stopped(signal, f"{done}; nothing was saved")
    return Stopped(signal, f"{done}, saved in {run.save(out, step, wait=True)}; go on with --resume {out}")


def check_schedule(options: TrainOptions) -> None:
    """Raise `OptionError` for a schedule that does not exist or does not take its options, without a model."""
    make_scheduler(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=options.lr), options)


def make_scheduler(optimizer: torch.optim.Optimizer, options: TrainOptions) -> Any:
    """A learning-rate scheduler of transformers, stepped once an optimizer step."""
    from transformers import get_scheduler

    try:
        return get_scheduler(
            options.schedule,
            optimizer,
            num_warmup_steps=options.counted(options.warmup),
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


def peak_nbytes(device: torch.device) -> int:
    """The most bytes that were held at once: reserved on the CUDA device, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

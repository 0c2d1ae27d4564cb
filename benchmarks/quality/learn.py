"""Runs the steps of one learner: the same batches and rates for all methods, and held-out losses on the way."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.data import Sequences, Text
from benchmarks.quality.learner import Learner

EVALUATED = 16  # sequences in one go
LAST = 50  # steps whose training losses are averaged at the end
TWELFTHS = (1, 2, 4, 6, 8, 10, 12)  # of the steps, after which held-out text is evaluated


@dataclass(frozen=True)
class Lesson:
    """How long, how much in a step, the rate at its highest, and the seed of the order of sequences."""

    steps: int
    batch: int
    lr: float
    seed: int
    device: torch.device


@dataclass(frozen=True)
class Learned:
    """Losses before and after (None: not finite), and at points of the way: steps, tokens and loss; seconds, and bytes.

    ``training`` is the mean loss of the last batches; ``first_s`` the first step, ``steady_ms`` a step of the last two
    thirds, ``train_s`` all steps; ``reserved`` the most that torch reserved on a GPU during steps.
    """

    before: float
    loss: float | None
    training: float | None
    curve: list[tuple[int, int, float | None]]
    first_s: float
    steady_ms: float | None
    train_s: float
    reserved: int


def rate(step: int, steps: int) -> float:
    """The share of the learning rate at a step: up over a twentieth of them, then down to a tenth as a cosine."""
    rising = max(steps // 20, 1)
    if step < rising:
        return (step + 1) / rising
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))


@torch.no_grad()
def held_out_loss(model: Any, text: Sequences, device: torch.device) -> float:
    """The mean over all labels that count; the model is in training mode afterwards."""
    model.eval()
    total, counted = 0.0, 0
    for start in range(0, len(text), EVALUATED):
        rows = slice(start, start + EVALUATED)
        if count := text.counted(rows):
            total += float(model(**text.batch(rows, device)).loss) * count
            counted += count
    model.train()
    return total / counted


def learn(learner: Learner, text: Text, lesson: Lesson) -> Learned:
    """Train to the end, or to the first evaluation whose loss is not finite: what follows would not be either."""
    steps, device = lesson.steps, lesson.device
    order = torch.randperm(len(text.training), generator=torch.Generator().manual_seed(lesson.seed))
    points = sorted({steps * n // 12 for n in TWELFTHS} - {0})
    tokens = lesson.batch * text.training.ids.shape[1]
    before = held_out_loss(learner.evaluated, text.held_out, device)
    curve: list[tuple[int, int, float | None]] = [(0, 0, before)]
    losses: list[Tensor] = []
    first, clock, steady, reserved = 0.0, _Clock(device), None, 0
    for step in range(steps):
        if step == steps // 3:  # graphs are compiled by then
            steady = clock.read()
        rows = order[torch.arange(step * lesson.batch, (step + 1) * lesson.batch) % len(order)]
        losses.append(learner.step(text.training.batch(rows, device), lesson.lr * rate(step, steps)))
        if step == 0:
            first = clock.read()
        if step + 1 in points:
            reserved = max(reserved, clock.pause())
            curve.append(
                (step + 1, (step + 1) * tokens, _finite(held_out_loss(learner.evaluated, text.held_out, device)))
            )
            clock.go_on()
            if curve[-1][2] is None:
                break
    finished = len(losses) == steps and steady is not None
    late = torch.stack(losses[-LAST:]).float().mean()
    return Learned(
        before,
        curve[-1][2],
        _finite(float(late)),
        curve,
        first,
        (clock.seconds - steady) / (steps - steps // 3) * 1e3 if finished and steady is not None else None,
        clock.seconds,
        reserved,
    )


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


class _Clock:
    """Seconds of training, without those of evaluation, and the memory that torch reserved meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = 0.0
        self.go_on()

    def go_on(self) -> None:
        """Count from now on, with no peak yet."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        self._begin = time.perf_counter()

    def read(self) -> float:
        """Seconds until now, when all that was begun is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds, self._begin = self.seconds + now - self._begin, now
        return self.seconds

    def pause(self) -> int:
        """Stop counting; the most bytes that torch had reserved at once since counting began."""
        self.read()
        return torch.cuda.max_memory_reserved(self._device) if self._device.type == "cuda" else 0

"""Measures a model on held-out rows: the mean loss over all that is to be learned there, and right classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chunkft_fx.errors import BudgetInfeasible
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.tools.data.rows import Rows, Sequences, learned_count
from chunkft_fx.tools.models.tasks import call_options


@dataclass(frozen=True)
class Score:
    """The mean loss over held-out rows, and the share of right classes where there are classes."""

    loss: float
    accuracy: float | None = None


def evaluate(model: CompiledModule, held_out: Rows | Tensor, batch_size: int, task: str = "causal") -> Score:
    """Score a model on all of ``held_out``; training mode is restored after.

    Where a batch's logits do not fit the budget beside what training holds, batches of half as many rows are taken.
    """
    rows = Sequences(held_out) if isinstance(held_out, Tensor) else held_out
    was_training = model.training
    model.eval()
    try:
        return _score(model, rows, batch_size, task)
    finally:
        model.train(was_training)


@torch.no_grad()
def _score(model: CompiledModule, rows: Rows, batch_size: int, task: str) -> Score:
    device = next(model.parameters()).device
    options = call_options(model, task)
    total, learned, right, done = 0.0, 0, 0, 0
    while done < len(rows):
        chosen = range(done, min(done + batch_size, len(rows)))
        batch = rows.batch(chosen, done)
        try:
            outputs = model(**{name: t.to(device) for name, t in batch.items()}, **options)
        except BudgetInfeasible:
            if batch_size == 1:
                raise
            batch_size //= 2
            continue
        count = learned_count(batch, shifted=task == "causal")
        total += float(outputs.loss) * count
        learned += count
        done += len(chosen)
        if task == "classification":
            right += int((outputs.logits.argmax(-1).cpu() == batch["labels"]).sum())
    return Score(total / learned, right / learned if task == "classification" else None)

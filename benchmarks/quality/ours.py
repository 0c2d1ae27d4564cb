"""Makes learners of this library, and of dense AdamW, which it is compared with.

The options of a row go where the library takes them: to `chunkft_fx.compile` or to `chunkft_fx.AdamW`, whichever has
one of that name.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

import chunkft_fx
from benchmarks.quality.learner import Batch, Learner, on_masters, set_rate

BETAS = (0.9, 0.999)
COMPILE = frozenset(inspect.signature(chunkft_fx.compile).parameters) - {"model", "coverage", "backend", "device"}
COMPILE -= {"batch", "region_passes", "program_passes"}  # no text can name them
ADAMW = frozenset(inspect.signature(chunkft_fx.AdamW).parameters) - {"model", "lr", "betas", "weight_decay"}
OPTIONS = COMPILE | ADAMW | {"beta1", "beta2"}


def dense(model: nn.Module, options: dict[str, Any]) -> Learner:
    """torch's AdamW on float32 masters, everything on the device."""

    def make(masters: dict[str, Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(masters.values(), betas=_betas(options), weight_decay=0.0, fused=True)

    return on_masters(model, make, options["max_grad_norm"], is_compiled=True)


def covering_all(model: nn.Module, options: dict[str, Any]) -> Learner:
    """This library, an update of all parameters in every step."""
    return _chunked(model, "all", options)


def covering_one(model: nn.Module, options: dict[str, Any]) -> Learner:
    """This library, a chunk a step."""
    return _chunked(model, "one", options)


def _chunked(model: nn.Module, coverage: str, options: dict[str, Any]) -> Learner:
    backend = "inductor" if next(model.parameters()).is_cuda else "eager"
    given = {key: value for key, value in options.items() if key in COMPILE}
    compiled = chunkft_fx.compile(model, coverage=coverage, backend=backend, **given)
    given = {key: value for key, value in options.items() if key in ADAMW}
    optimizer = chunkft_fx.AdamW(compiled, betas=_betas(options), weight_decay=0.0, **given)

    def step(batch: Batch, lr: float) -> Tensor:
        set_rate(optimizer, lr)
        loss: Tensor = compiled(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Learner(step, compiled)


def _betas(options: dict[str, Any]) -> tuple[float, float]:
    # floats, since torch's AdamW refuses one of them with an int
    return float(options.get("beta1", BETAS[0])), float(options.get("beta2", BETAS[1]))

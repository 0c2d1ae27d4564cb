"""A training loop done twice: with full coverage, and with torch's optimizer on the plain model.

`Loop` says what the loop does beside forward, backward and step, so that tests can draw it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.plan import pieces
from tests.support.forced_streaming import streaming

RATE, DECAY = 1e-3, 0.1
UPDATES = ("step", "backward")
# What a model is called with, by the step and the number of the backward pass within it.
Batches = Callable[[int, int], dict[str, Any]]
# The scalar loss in what a model returns.
LossOf = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Loop:
    """``streamed`` is a share of `forced_streaming`, ``piece`` the largest bytes of a piece; both may be left out."""

    update: str
    steps: int = 10
    micro: int = 1
    clip: float | None = None
    no_decay: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    streamed: str = ""
    piece: int = 0

    def __str__(self) -> str:
        told = [f"update={self.update}", "accumulated" * (self.micro > 1), "clipped" * (self.clip is not None)]
        told += ["groups" * bool(self.no_decay), "frozen" * bool(self.frozen), "streamed" * bool(self.streamed)]
        return ", ".join(t for t in told if t)


def with_full_coverage(model: nn.Module, loop: Loop, batches: Batches, loss_of: LossOf) -> dict[str, Tensor]:
    """Parameters and buffers of a copy of the model after all steps, compiled with full coverage."""
    with streaming(loop.streamed) if loop.streamed else nullcontext(), _pieces_of(loop.piece):
        compiled = chunkft_fx.compile(_copy(model, loop), "4GB", coverage="all", backend="eager")
        optimizer = chunkft_fx.AdamW(
            compiled, RATE, weight_decay=DECAY, no_decay=loop.no_decay, max_grad_norm=loop.clip, update=loop.update
        )
        for step in range(loop.steps):
            for i in range(loop.micro):
                with nullcontext() if i == loop.micro - 1 else compiled.no_sync():
                    _backward(compiled, loop, batches, loss_of, step, i)
            optimizer.step()
            optimizer.zero_grad()
        return _state(compiled)


def of_the_plain_model(
    model: nn.Module, loop: Loop, batches: Batches, loss_of: LossOf, call: Callable[[nn.Module], Any] = lambda m: m
) -> dict[str, Tensor]:
    """The same of a copy that torch's AdamW trains; ``call`` makes of it what is called."""
    trained = _copy(model, loop)
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, p in trained.named_parameters():
        if p.requires_grad:
            groups[not any(fnmatchcase(name, pattern) for pattern in loop.no_decay)].append(p)
    decayed = [{"params": g, "weight_decay": DECAY * is_decayed} for is_decayed, g in groups.items() if g]
    optimizer = torch.optim.AdamW(decayed, RATE)
    called = call(trained)
    for step in range(loop.steps):
        for i in range(loop.micro):
            _backward(called, loop, batches, loss_of, step, i)
        if loop.clip is not None:
            nn.utils.clip_grad_norm_(trained.parameters(), loop.clip)
        optimizer.step()
        optimizer.zero_grad()
    return _state(trained)


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference of an element, against the larger of 1 and its value, and the name of its tensor."""
    assert ours.keys() == theirs.keys()
    found = [(_difference(ours[name], value), name) for name, value in theirs.items() if value.numel()]
    return max(found, default=(0.0, ""), key=lambda entry: entry[0])


def _difference(a: Tensor, b: Tensor) -> float:
    """Infinite where one is not a number."""
    if torch.equal(a, b):
        return 0.0
    error = ((a.double() - b.double()).abs() / b.double().abs().clamp(min=1.0)).max()
    return float(error.nan_to_num(nan=float("inf")))


def _copy(model: nn.Module, loop: Loop) -> nn.Module:
    copied = copy.deepcopy(model)
    for name in loop.frozen:
        copied.get_parameter(name).requires_grad_(False)
    return copied


def _backward(called: Any, loop: Loop, batches: Batches, loss_of: LossOf, step: int, i: int) -> None:
    torch.manual_seed(100 * step + i)
    (loss_of(called(**batches(step, i))) / loop.micro).backward()


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {n: v.detach().clone() for n, v in model.state_dict().items() if isinstance(v, Tensor)}


@contextmanager
def _pieces_of(nbytes: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        if nbytes:
            patched.setattr(pieces, "LARGEST_NBYTES", nbytes)
        yield

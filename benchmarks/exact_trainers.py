"""The trainers that `bench_exact` measures: the model, this library, and torch alone with everything on the device.

A trainer is made of a setting and gives one function: a whole optimizer step over ``ids`` (``i64[batch, sequence]``),
which returns the loss before it. All have bf16 weights, AdamW without weight decay at one learning rate, torch's
attention (SDPA), and gradient checkpointing where they decide about it. None clips gradients but ``ours-step`` and
``ours-late``, which have to show that they can.

- ``ours-backward``, ``ours-step``, ``ours-late``: float32 masters and moments; ``ours-without``: the same program
  without updates;
  ``ours-vertical``: ``ours-backward`` with the parts of a batch (``--micro ours-vertical=8``) in one step.
- ``dense``, ``dense-compiled``: float32 masters and moments, torch's fused AdamW for a parameter at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import chunkft_fx
from benchmarks.shapes import build
from chunkft_fx.machine.memory_limit import Allocator
from chunkft_fx.optim.states.pieces import PieceUpdates

LEARNING_RATE = 1e-5
Step = Callable[[Tensor], Tensor | float]


@dataclass(frozen=True)
class Setting:
    """What is trained: a shape, its depth if another, sequences in a batch and in a part of it, and ours' options."""

    shape: str
    layers: int | None
    batch: int
    micro: int | None  # None: a batch in one go
    sequence: int
    budget: str
    master: str
    state_dtype: str
    is_unlimited: bool

    @property
    def parts(self) -> int:
        """The fewest equal parts of a batch that are no larger than ``micro`` sequences."""
        most = self.micro or self.batch
        return next(n for n in range(1, self.batch + 1) if self.batch % n == 0 and self.batch // n <= most)


@dataclass(frozen=True)
class Made:
    """A trainer that is ready, floating-point operations for a token, and what was predicted, where something was.

    The prediction is seconds of a step and bytes of the device.
    """

    step: Step
    flops: Callable[[int], float]
    predicted: Callable[[], tuple[float, int]] = lambda: (0.0, 0)


Maker = Callable[[Setting], Made]


class BatchTooLarge(Exception):
    """The device's memory did not suffice for a forward or a backward: parts of a batch may fit."""


@contextmanager
def forward_backward() -> Iterator[None]:
    """Raise `BatchTooLarge` where a forward and backward finds no memory; elsewhere a smaller batch would not help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BatchTooLarge from error


def flops_of(model: Any) -> Callable[[int], float]:
    """Operations of forward and backward for a token in a sequence of that length, a multiply-add being two.

    6 for each parameter that a token is multiplied with (a look-up multiplies nothing), and causal attention: half of
    the two products of a sequence with itself. What is computed again counts once.
    """
    config = model.config
    counted = sum(p.numel() for p in model.parameters())
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        counted -= model.get_input_embeddings().weight.numel()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * head
    return lambda sequence: 6.0 * counted + attention * sequence


def ours(update: str | None, is_vertical: bool = False) -> Maker:
    """This library with full coverage; ``update`` says when parameters are updated, ``None``: never.

    ``is_vertical``: the parts of a batch run as micro-batches of one step, each region over all of them.
    """

    def make(setting: Setting) -> Made:
        model: Any = build(setting.shape, "cpu", setting.layers)
        flops = flops_of(model)
        if setting.is_unlimited:
            Allocator.set_fraction = lambda *_: None  # type: ignore[method-assign]
        compiled: Any = chunkft_fx.compile(model, setting.budget, coverage="all", device="cuda")
        if update is None:
            leave_updates_out()
        options: dict[str, Any] = {"update": update or "backward", "master": setting.master}
        options["state_dtype"] = setting.state_dtype
        options["max_grad_norm"] = 1.0 if update in ("step", "late") else None
        optimizer = chunkft_fx.AdamW(compiled, lr=LEARNING_RATE, weight_decay=0.0, **options)

        def step(ids: Tensor) -> Tensor:
            if is_vertical:
                loss = together(compiled, ids, setting.parts)
            else:
                loss = backward(compiled, ids, setting.parts, compiled.no_sync)
            optimizer.step()
            optimizer.zero_grad()
            return loss

        def predicted() -> tuple[float, int]:
            plan = compiled.plan
            return (plan.predicted_step_us or 0.0) / 1e6, plan.predicted_peak_bytes or 0

        return Made(step, flops, predicted if update else Made.predicted)

    return make


def leave_updates_out() -> None:
    """From now on in this process, update nodes of programs do nothing: forward and backward of the same program."""
    for name in ("fetch_states", "update", "write_states"):
        setattr(PieceUpdates, name, lambda *_: None)


def backward(model: Any, ids: Tensor, parts: int, not_last: Callable[[], Any] = nullcontext) -> Tensor:
    """Forward and backward over equal parts of a batch, all but the last under ``not_last()``.

    Gradients are those of the mean over the batch, which is returned.
    """
    total = torch.zeros((), device=ids.device)
    for i, part in enumerate(ids.chunk(parts)):
        with forward_backward(), not_last() if i < parts - 1 else nullcontext():
            loss = model(input_ids=part, labels=part).loss / parts
            loss.backward()
        total += loss.detach()
    return total


def together(model: Any, ids: Tensor, parts: int) -> Tensor:
    """`backward` in one step of this library."""
    with forward_backward():
        outputs = model.accumulate([{"input_ids": part, "labels": part} for part in ids.chunk(parts)])
        loss = torch.stack([o.loss for o in outputs]).mean()
        loss.backward()
    return loss.detach()


class MasterAdamW(torch.optim.Optimizer):
    """torch's fused AdamW on float32 masters of bf16 parameters, where the parameters are.

    Each parameter has an optimizer of its own, and all share the memory for one float32 gradient. Masters are made at
    the first step: before it torchao may still be copying the parameters that it gives.
    """

    _gradient: ClassVar[dict[torch.device, Tensor]] = {}

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.0) -> None:
        """``params`` as torch's optimizers take them."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._optimizers: dict[Tensor, torch.optim.AdamW] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every master whose parameter has a gradient, and round it into the parameter."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if p not in self._optimizers:
            new = torch.optim.AdamW([p.detach().float()], group["lr"], weight_decay=group["weight_decay"], fused=True)
            self._optimizers[p] = new
        optimizer = self._optimizers[p]
        (master,) = optimizer.param_groups[0]["params"]
        master.grad = self._wide(gradient)
        optimizer.step()
        master.grad = None
        p.copy_(master)

    @classmethod
    def _wide(cls, gradient: Tensor) -> Tensor:
        """The gradient in float32, in memory that is kept: new host memory costs more than the conversion."""
        room = cls._gradient.get(gradient.device)
        if room is None or room.numel() < gradient.numel():
            room = torch.empty(gradient.numel(), dtype=torch.float32, device=gradient.device)
            cls._gradient[gradient.device] = room
        return room[: gradient.numel()].view(gradient.shape).copy_(gradient)


def checkpointed(setting: Setting) -> Any:
    """The model on the GPU, which computes each block's activations again."""
    model: Any = build(setting.shape, "cuda", setting.layers)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def plain_step(model: Any, optimizer: torch.optim.Optimizer, parts: int) -> Step:
    def step(ids: Tensor) -> Tensor:
        loss = backward(model, ids, parts)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def dense(setting: Setting) -> Made:
    """torch alone, everything on the device."""
    model = checkpointed(setting)
    return Made(plain_step(model, MasterAdamW(model.parameters(), LEARNING_RATE), setting.parts), flops_of(model))


def dense_compiled(setting: Setting) -> Made:
    """torch alone, compiled: the partitioner decides what is saved."""
    model: Any = build(setting.shape, "cuda", setting.layers)
    optimizer = MasterAdamW(model.parameters(), LEARNING_RATE)
    return Made(plain_step(torch.compile(model), optimizer, setting.parts), flops_of(model))


TRAINERS: dict[str, Maker] = {
    "ours-backward": ours("backward"),
    "ours-step": ours("step"),
    "ours-late": ours("late"),
    "ours-without": ours(None),
    "ours-vertical": ours("backward", is_vertical=True),
    "ours-vertical-step": ours("step", is_vertical=True),
    "ours-vertical-late": ours("late", is_vertical=True),
    "ours-vertical-without": ours(None, is_vertical=True),
    "dense": dense,
    "dense-compiled": dense_compiled,
}

"""Writes into a Trainer's logs what a compiled model trains, how fast, and the memory that it takes of its budget."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from chunkft_fx.errors import OptionError
from chunkft_fx.module.module import CompiledModule, training_of


class TrainerLog(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """A callback that adds numbers to each training log of a Trainer whose model is compiled.

    ``chunkft/chunk`` is the chunk that is active, of ``chunkft/chunks``: where a step covers all parameters, number 0
    of 1. ``chunkft/tokens_per_second`` counts the elements of ``input_ids``, padding too, since the log before
    (evaluation and saving included). On a GPU ``chunkft/reserved_bytes`` is the most memory that torch has reserved,
    which the budget bounds; ``chunkft/budget_bytes`` is that budget.

    A callback's numbers reach the log history and the callbacks behind it: give it to ``Trainer(callbacks=[...])``, and
    it comes behind those of ``report_to``. `attach` puts it before them.
    """

    def __init__(self) -> None:
        self._tokens, self._since, self._hook = 0, 0.0, None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Begin to count tokens. Raises `OptionError` for a model that is not compiled."""
        if not issubclass(type(model), CompiledModule):
            raise OptionError(
                f"TrainerLog logs what a compiled model does, but the trainer's is a plain {type(model).__name__}; "
                "compile it with chunkft_fx.compile, or attach to the trainer, or leave the callback out"
            )
        self._forget_hook()  # of a training that was interrupted
        self._tokens, self._since = 0, time.perf_counter()
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop counting."""
        self._forget_hook()

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **_: Any) -> None:
        """Add the numbers to a log of training; those of evaluations and the summary at the end have none."""
        if self._hook is None or "loss" not in logs:
            return
        now = time.perf_counter()
        found = {"chunkft/tokens_per_second": self._tokens / (now - self._since), **_state(model)}
        self._tokens, self._since = 0, now
        logs.update(found)
        state.log_history[-1].update(found)

    def _forget_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _count(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if model.training and torch.is_grad_enabled() and isinstance(ids, Tensor):
            self._tokens += ids.numel()


def _state(model: Any) -> dict[str, float]:
    training = training_of(model, "TrainerLog")
    found: dict[str, float] = {"chunkft/budget_bytes": training.options.budget_bytes}
    if training.known_plan is not None:
        found |= {"chunkft/chunk": training.chunk, "chunkft/chunks": len(training.plan.chunks)}
    if training.compute_device.type == "cuda":
        found["chunkft/reserved_bytes"] = torch.cuda.max_memory_reserved(training.compute_device)
    return found

"""Runs in the model's place: the module that `chunkft_fx.compile` returns, with a chunk active at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from chunkft_fx.bytes import format_bytes
from chunkft_fx.capture.outline import Template
from chunkft_fx.copies.residency import Residency
from chunkft_fx.errors import DistributedNotSupported, NotPlanned, OptimizerMismatch, OptionError
from chunkft_fx.gradients.slices import ActiveSlice
from chunkft_fx.module.routing import through_compiled
from chunkft_fx.module.stand_in import StandIn
from chunkft_fx.module.training import Training
from chunkft_fx.plan.plan import Plan
from chunkft_fx.plan.schedule import ChunkSchedule
from chunkft_fx.planning.planner import Options, first_plan
from chunkft_fx.predict.step_clock import Span
from chunkft_fx.predict.step_memory import Moment, step_timeline
from chunkft_fx.program.program import Program
from chunkft_fx.program.programs import Programs
from chunkft_fx.program.variants import Variant


class CompiledModule(StandIn):
    """A model whose backward fills only the active chunk's slices; everything else is the wrapped model's.

    It can be used in the model's place (`module.stand_in`), follows changes of the model where it can and refuses the
    others by name (`following.following`). Calls from several threads come one after another. What it shows beside the
    model's own attributes: ``plan``, ``chunk``, ``activate``, ``active_slices``, ``schedule``, ``no_sync``
    and ``accumulate`` for training, ``program``, ``templates``, ``variants``, ``timeline``, ``spans`` and ``residency``
    for looking inside.
    """

    _training: Training

    def __init__(
        self, model: nn.Module, options: Options, backend: str, plan: Plan | None, device: torch.device
    ) -> None:
        training = Training(model, options, backend, plan, device)

        def run(*args: Any, **kwargs: Any) -> Any:
            return training.run(*args, **kwargs)

        super().__init__(model, run)
        self.__dict__["_training"] = training

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name == "save_pretrained":
            self._training.refuse_partial_step()
        if name != "generate":
            return value
        training = self._training
        return through_compiled(value, self._model, self.forward, training.residency, training.lock)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``state_dict``; `PartialStep` while some parameters are a step ahead of the others."""
        self._training.refuse_partial_step()
        return super().state_dict(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """Copies and pickles carry the wrapped model, the options and hooks; the copy is traced and planned anew."""
        training = self._training
        return _rebuild, (self._model, training.options, training.backend, training.residency.device), self._call_hooks

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What ``to``, ``cuda``, ``half`` and their like do to all tensors, as far as the plan allows.

        Raises `ModelChanged` for another dtype or another GPU once training has begun.
        """
        training = self._training
        with training.lock:
            move, placing = training.place(fn)
            with training.gradients_kept():
                super()._apply(placing, recurse)
            training.placed(move)
            return self

    def _replicate_for_data_parallel(self) -> Any:
        """What `torch.nn.DataParallel` asks on several GPUs, around which a Trainer puts it by itself."""
        raise DistributedNotSupported(
            "torch.nn.DataParallel copies a model onto each GPU, and a compiled module runs on one; let the process "
            "see one GPU (CUDA_VISIBLE_DEVICES=0), where transformers' Trainer makes no DataParallel"
        )

    @property
    def plan(self) -> Plan:
        """The plan. With ``chunks="auto"`` it exists from the first training batch on, else `NotPlanned`."""
        return self._training.plan

    @property
    def schedule(self) -> ChunkSchedule:
        """Where in the sweep training is."""
        return self._training.schedule

    @property
    def chunk(self) -> int:
        """The index of the active chunk."""
        return self._training.chunk

    def activate(self, chunk: int) -> None:
        """Make a chunk active; gradients of the chunk that was active are dropped if it is another one.

        Raises `OptionError` for a chunk that the plan does not have.
        """
        self._training.activate(chunk)

    def active_slices(self) -> tuple[ActiveSlice, ...]:
        """The active slices with their gradients: the same objects until the active chunk changes."""
        return self._training.active_slices()

    def no_sync(self) -> AbstractContextManager[None]:
        """A context in which backward passes only add to gradients, whatever the optimizer's ``update`` is.

        The forward belongs into it, too, as in `torch.nn.parallel.DistributedDataParallel.no_sync`. With
        ``update="backward"`` gradients wait in host memory, and the next backward of a forward outside uses what was
        added up.
        """
        return self._training.no_sync()

    def accumulate(self, batches: Sequence[Any]) -> list[Any]:
        """Run several micro-batches in one step; returns what a call returns for each, in order.

        Each of ``batches`` is a dict of keyword arguments or a tuple of positional ones, all of the same shapes and
        dtypes. Make one loss out of the outputs and call ``backward()`` once: gradients are those of all micro-batches,
        as if they had run one after the other. But each region runs over all of them before the next, so that weights
        and optimizer states cross the link once a step, and ``update="backward"`` updates behind the last of them.
        Raises `OptionError` for micro-batches that differ, or hooks on the call; `UnsupportedGraph` for a model that
        cannot run region by region.
        """
        if self._call_hooks and any(self._call_hooks.values()):
            raise OptionError(
                "accumulate makes one step of several calls, around which hooks on the module's call have no place; "
                "remove them, or register them on a submodule"
            )
        return self._training.accumulate(batches)

    @property
    def residency(self) -> Residency:
        """Where each weight lives."""
        return self._training.residency

    @property
    def _programs(self) -> Programs:
        """All programs of the latest capture; `NotPlanned` before the first call."""
        return self._training.last_programs

    @property
    def program(self) -> Program:
        """The program that ran last (or was built last); `NotPlanned` before the first call."""
        return self._training.last_executable.program

    @property
    def timeline(self) -> tuple[Moment, ...]:
        """What its step is predicted to hold, moment by moment, beside weights, states and gradients held before."""
        return step_timeline(self._training.last_executable, self._training.backend)

    @property
    def spans(self) -> tuple[Span, ...]:
        """When each call, copy and update of a step is predicted to run, on which of four lanes, in microseconds.

        Empty where no times are known, as on the CPU, or where a step trains one chunk; `NotPlanned` without a plan.
        """
        if not self.plan.policy.pieces:
            return ()
        return next((found for s in reversed(self._training.sessions) if (found := s.plans.spans())), ())

    @property
    def templates(self) -> tuple[Template, ...]:
        """The distinct region graphs of the latest capture."""
        if not self._training.sessions:
            raise NotPlanned("the model has not been traced yet; call it once on a batch")
        return self._training.sessions[-1].programs.outline.templates

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Every variant made so far, over all captures."""
        return tuple(v for session in self._training.sessions for v in session.programs.specializer.variants)

    def extra_repr(self) -> str:
        known, budget = self._training.known_plan, self._training.options.budget_bytes
        return f"budget={format_bytes(budget)}, {'not planned yet' if known is None else f'{len(known.chunks)} chunks'}"


def training_of(model: object, optimizer: str) -> Training:
    """The training of a compiled module; `OptimizerMismatch` for anything else that ``optimizer`` was given."""
    # Looked up by type: for isinstance a compiled module passes as the model's class.
    if issubclass(type(model), CompiledModule):
        training: Training = model.__dict__["_training"]
        return training
    hint = ""
    if isinstance(model, list) and model and isinstance(model[0], dict):  # as Trainer calls a class of optimizers
        hint = (
            "; in optimizer_cls_and_kwargs of a transformers Trainer write a function that gives the class, "
            f"(lambda: chunkft_fx.{optimizer}, {{...}}), which Trainer calls with the model"
        )
    raise OptimizerMismatch(
        f"{optimizer} was given a {type(model).__module__}.{type(model).__qualname__}; pass the module returned by "
        f"chunkft_fx.compile itself, not its parameters, the plain model, or what torch.compile returned{hint}"
    )


def _rebuild(model: nn.Module, options: Options, backend: str, device: torch.device) -> CompiledModule:
    return CompiledModule(model, options, backend, first_plan(model, options), device)

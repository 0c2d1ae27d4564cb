"""Decides what becomes of a change that its user makes to the model after compile: it is taken up, or refused by name.

Before the first optimizer step every change is followed: the model is captured and planned anew. Later, parameters may
be replaced by others of the same shape and dtype, whose states go on, and what was frozen or unfrozen counts from the
next sweep on. Everything else is refused before anything has changed. Gradients that wait for their step are kept: a
new plan waits for that step, and as long as nothing is trained at all.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from chunkft_fx.copies.residency import Residency, compute_device
from chunkft_fx.copies.states.stage import StageOwner
from chunkft_fx.errors import AlreadyCompiled, ChunkFTWarning, ModelChanged
from chunkft_fx.following import ownership
from chunkft_fx.following.distribution import refuse_other_ranks
from chunkft_fx.following.model_watch import ModelChanges, ModelWatch
from chunkft_fx.following.moves import Move, gradients_aside, warn_of_dropped_gradients
from chunkft_fx.gradients.gate import Arrivals, GradientGate
from chunkft_fx.gradients.slices import ActiveSlice
from chunkft_fx.plan.plan import Plan
from chunkft_fx.plan.schedule import ChunkSchedule
from chunkft_fx.plan.state_spec import spec_of
from chunkft_fx.planning.planner import Options, first_plan
from chunkft_fx.ranks.ranks import Ranks


class ModelOptimizer(StageOwner, Protocol):
    """What a compiled module asks of its optimizer."""

    param_groups: list[dict[str, Any]]

    @property
    def has_begun(self) -> bool: ...

    def follow(self, parameters: Mapping[str, nn.Parameter]) -> None: ...

    def refuse_partial_step(self) -> None: ...


class Following(ABC):
    """Keeps up with a model in training; how a model is taken up is its subclass's matter (`module.training`)."""

    model: nn.Module
    options: Options
    _plan: Plan | None
    _slices: tuple[ActiveSlice, ...] | None
    _position: dict[str, Any] | None
    residency: Residency
    _watch: ModelWatch
    _gate: GradientGate
    _optimizer: weakref.ref[ModelOptimizer] | None
    _advanced: bool  # an optimizer step was counted
    _is_due: bool  # the next sweep is over other parameters than this one
    _sweep: int  # the sweep that the next schedule begins with
    _gave_up: bool  # a module compiled later has the parameters
    arrivals: Arrivals
    lock: threading.RLock
    ranks: Ranks

    @property
    @abstractmethod
    def schedule(self) -> ChunkSchedule:
        """Where in the sweep training is."""

    @property
    @abstractmethod
    def is_bound(self) -> bool:
        """Whether another cut into chunks would lose a position, states or gradients, or a backward that may come."""

    @abstractmethod
    def _take_up(self, plan: Plan | None, device: torch.device) -> None:
        """Begin with the model as it is now: nothing is captured, and of the plan only what the user gave is there."""

    def check(self) -> None:
        """Follow what changed in the model since it was looked at last, or refuse it, before anything else changes.

        Before the first optimizer step every change is followed: the model is captured and planned anew. Later,
        parameters may be replaced by others of the same shape and dtype, whose states go on, and what was frozen or
        unfrozen counts from the next sweep on. Raises `ModelChanged` for anything else, `DistributedNotSupported`,
        and as `chunkft_fx.compile` does.
        """
        with self.lock:
            if self._gave_up:
                raise AlreadyCompiled(
                    "chunkft_fx.compile was called again on this model, before this module had trained it; use the "
                    "module that the later call returned"
                )
            refuse_other_ranks(self.ranks.size)
            changes = self._watch.changes()
            if changes is not None:
                self.follow_updates()
                self._refuse_plain_tensors()
                if self.has_begun or (self._must_wait() and not changes.is_another_model):
                    self._follow(changes)
                else:
                    self._begin_anew(self.residency.device)
            if self._is_due and self.schedule.is_at_start and not self._must_wait():
                self.follow_updates()
                self._sweep = self.schedule.sweep
                self._begin_anew(self.residency.device)

    @abstractmethod
    def follow_updates(self) -> None:
        """Put work that follows on the current stream behind the updates of the step before, which may still run."""

    def _must_wait(self) -> bool:
        """Whether a new plan must wait: gradients of the present chunk wait for their step, or nothing is trained."""
        came = self.arrivals.through or self.arrivals.outside
        return came or not any(p.requires_grad for p in self.model.parameters())

    def _refuse_plain_tensors(self) -> None:
        for name, p in self.model.named_parameters():
            if not isinstance(p, nn.Parameter):
                raise ModelChanged(
                    f"{name} is a plain tensor in the place of a parameter, where torch.func.functional_call puts it: "
                    "optimizer states and gradients belong to parameters; use functional_call on the plain model that "
                    "was given to chunkft_fx.compile"
                )

    def _follow(self, changes: ModelChanges) -> None:
        """Go on with a model that changed in the middle of a run."""
        if changes.is_another_model:
            raise ModelChanged(
                f"the model is not the one that was planned and trained so far: {changes}; undo the change, or call "
                "chunkft_fx.compile on the plain model and make a new optimizer (before the first optimizer step such "
                "changes are followed)"
            )
        parameters, optimizer = dict(self.model.named_parameters()), self.optimizer
        if changes.replaced:
            ownership.claim(parameters.values(), self)
            if optimizer is not None:
                optimizer.follow(parameters)
            if self._slices is not None:  # what was not replaced keeps its gradient
                self._slices = tuple(ActiveSlice(s.slice, parameters[s.name]) for s in self._slices)
            self.residency.rebind(parameters)
        self._look()
        self._gate.guard(parameters)
        if changes.frozen or changes.unfrozen:
            self._is_due = True
            if not self.schedule.is_at_start:
                warnings.warn(
                    f"in the middle of a sweep over the chunks, {changes}; what is trained now is cut into chunks anew "
                    "when the next sweep begins",
                    ChunkFTWarning,
                    stacklevel=4,
                )

    def _look(self) -> None:
        """Remember the model as it is now; parameters that it has no more are their user's own again."""
        before = self._watch.parameters
        self._watch.look()
        kept = {id(p) for p in self._watch.parameters.values()}
        ownership.release([p for p in before.values() if id(p) not in kept], self)

    @property
    def has_begun(self) -> bool:
        """Whether an optimizer step was counted, or states were loaded, since this module was made."""
        optimizer = self.optimizer
        return self._advanced or (optimizer is not None and optimizer.has_begun)

    @property
    def optimizer(self) -> ModelOptimizer | None:
        """The optimizer of this module: the latest that was made for it, if it is alive."""
        return None if self._optimizer is None else self._optimizer()

    def _begin_anew(self, device: torch.device) -> None:
        """Capture and plan the model as it is now; an optimizer keeps the states of parameters that are still there.

        Gradients that were gathered for a step are of the model as it was: they are dropped, with a `ChunkFTWarning`.
        """
        is_waiting = self.arrivals.through or self.arrivals.outside  # no step has used them
        if is_waiting and any(s.grad is not None for s in self._slices or ()):
            warn_of_dropped_gradients()
        parameters, optimizer = dict(self.model.named_parameters()), self.optimizer
        plan = first_plan(self.model, self.options, spec_of(optimizer))
        if optimizer is not None:
            optimizer.follow(parameters)
        if self._plan is not None:
            self._position = None  # it counted over other cuts
        self._take_up(plan, device)
        self._is_due = False

    def give_up(self) -> None:
        """Leave the model to a module that was compiled later."""
        self._gate.close()
        self._gave_up = True

    def _drop_gradients(self) -> None:
        for s in self._slices or ():
            s.parameter.grad = None

    def place(self, fn: Callable[[Tensor], Tensor]) -> tuple[Move, Callable[[Tensor], Tensor]]:
        """What a function that ``to``, ``cuda`` or ``half`` applies to all tensors would do to the model.

        Returns the move, and the function to apply instead. Weights stay where the plan has them: on the way to the
        device that the model runs on only buffers and what was elsewhere by the user's own doing move, and on the way
        from host memory to a GPU only buffers, if all weights are more than the budget. Raises `ModelChanged` for
        another dtype or another GPU once training has begun; before, the model is planned for what it became
        (`placed`).
        """
        self.check()
        move, device = Move.of(self.model, fn), self.residency.device
        if self.has_begun and move.retypes:
            raise ModelChanged(
                "the parameters of a model in training cannot be given another dtype: optimizer states belong to "
                "the one they have; convert the model before the first optimizer step"
            )
        if self.has_begun and move.device not in (device, torch.device("cpu"), None):
            raise ModelChanged(
                f"a model that trains on {device} cannot be moved to {move.device}; compile the plain model there"
            )
        if move.device not in (device, None):
            compute_device(self.model, move.device)  # refuses what no model can run on, before a tensor moves
        stay = {id(p) for p in self._staying(move)}
        return move, lambda t: move.retyped(t) if id(t) in stay else fn(t)

    def _staying(self, move: Move) -> list[nn.Parameter]:
        """The weights that a move to a device leaves where they are, for the plan to put in their places."""
        parameters, host = self._watch.parameters, torch.device("cpu")
        if move.device == self.residency.device:
            is_placed = self._plan is not None and self._plan.batch
            return [parameters[n] for n in self.residency.streamed] if is_placed else list(parameters.values())
        fits = sum(p.nbytes for p in parameters.values()) <= self.options.budget_bytes
        return [] if fits or move.device in (host, None) else [p for p in parameters.values() if p.device == host]

    @contextlib.contextmanager
    def gradients_kept(self) -> Iterator[None]:
        """While inside, parameters have no gradients; those that stay as they are get them back."""
        with gradients_aside(self._watch.parameters.values()):
            yield

    def placed(self, move: Move) -> None:
        """Plan for the model as a move has left it, as long as training has not begun."""
        device = self.residency.device
        if not self.has_begun and (move.retypes or move.device not in (device, None)):
            self._begin_anew(device if move.device is None else compute_device(self.model, move.device))

"""Runs the step of any optimizer of this library: checks, clipping, staged states, step counts, and the schedule.

An optimizer is a `StateSpec`, the default options of its groups, and one update over slices (`optim.rules`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from chunkft_fx.bytes import parse_bytes
from chunkft_fx.copies.states.stage import Stage
from chunkft_fx.errors import NotPlanned, OptimizerMismatch, OptionError
from chunkft_fx.following import ownership
from chunkft_fx.gradients.slices import ActiveSlice, within_slice
from chunkft_fx.gradients.used import drop_used
from chunkft_fx.module.module import training_of
from chunkft_fx.optim.checkpoint import ENTRY, describe, exported, read, without_states
from chunkft_fx.optim.groups import (
    check_clipping,
    check_rate,
    check_slices,
    parameter_groups,
    refuse_switches,
    regrouped,
    require_coverage,
)
from chunkft_fx.optim.refusals import (
    refuse_outside,
    refuse_ranks,
    refuse_replaced,
    refuse_scaled_backward,
    refuse_scaling,
    refuse_strangers,
    warn_without_gradient,
)
from chunkft_fx.optim.states.numbers import Number
from chunkft_fx.optim.states.pieces import Apply, PieceUpdates
from chunkft_fx.optim.states.staging import StagedStates
from chunkft_fx.optim.sweep_rates import SweepRates, check_schedule_by, rates_now, turn
from chunkft_fx.optim.update import StagedSlice, Update, after_host_weights, clip_factor
from chunkft_fx.plan.state_spec import StateSpec


class ChunkedOptimizer(Optimizer, ABC):
    """What every optimizer on the active slices of a compiled module shares.

    ``no_decay`` holds glob patterns of parameter names (``"*.bias"``) that get no weight decay, in a second
    parameter group. ``max_grad_norm`` clips the global norm over the active chunk's gradients, as the update
    reads them: the gradients themselves stay as they are. ``last_grad_norm`` (a 0-d tensor on their device)
    is the norm before. As with ``torch.nn.utils.clip_grad_norm_``, a norm that is not finite is not masked:
    check it if your gradients can overflow.

    ``schedule_by`` says how learning rates that a scheduler or you set act where a step trains one of several chunks.
    By the ``"sweep"``, the rate at the first step of a sweep holds for all of it, so that no chunk gets less because of
    its place; the first sweep goes by step, and what chunks got less or more in it is made up later. A step at which a
    scheduler's rates are all 0 takes no chunk's turn. Steps wait for the value of a rate that is a tensor on a GPU. By
    the ``"step"``, an update uses the rate that is set then. ``last_rates`` has those that the last step used, one for
    each group. Other options act as they are set.

    The state of a parameter begins with the first activation of one of its slices: the tensors that ``spec`` names, and
    for bfloat16 and float16 parameters a float32 ``master`` weight of which the parameter is the rounded copy, or the
    ``remainder`` of one. A parameter that was changed from outside wins over its master.

    ``states="keep"`` keeps the states of all chunks in host memory, pinned and copied asynchronously when the
    model runs on CUDA. They may take ``host_budget`` (bytes or ``"64GB"``), by default what memory is available.
    ``states="reset"`` keeps none there: a chunk starts with states of zeros, step count 0 and its weights as
    masters whenever it becomes active, or when the model moves to another device.

    ``update`` says when a model that was compiled with ``coverage="all"`` changes: at the ``"step"``, as with torch's
    optimizers, ``"late"``, where the same updates run on into the next forward, in which each region waits for its own,
    or in the ``"backward"``, where each part is updated as soon as its gradients are complete. No
    gradients are then left, so they cannot be read, clipped or scaled (`UsedGradientError`); ``step()`` only counts.
    Late updates are seen by nobody: who reads a parameter between ``step()`` and the next call waits for them. That
    holds for torch's functions that are given the parameter. Before anything else reads its memory (an alias that was
    taken before, ``torch.func``, a collective, another thread while the model runs), call `finish_updates`.
    Backward passes inside ``model.no_sync()`` add to gradients which the next one outside uses. Gradients that wait for
    the step do so where the plan has room for them, on the device or in host memory (`WaitingGradient`), where
    ``host_budget`` does not count them.

    Raises `OptimizerMismatch` for anything but a module returned by `chunkft_fx.compile`, `OptionError`
    for an option out of range, `BudgetParseError` for a ``host_budget`` that is not bytes,
    `HostMemoryExceeded` if it cannot hold the states (``smaller`` are options with which they take less),
    `NoTrainableParameters`.
    """

    # Options of torch's optimizer of this name that this one has not.
    switches: tuple[str, ...] = ("maximize", "amsgrad", "differentiable")

    def __init__(
        self,
        model: nn.Module,
        spec: StateSpec,
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None,
        no_decay: Sequence[str],
        host_budget: int | str | None,
        update: str = "step",
        schedule_by: str = "sweep",
        smaller: Sequence[str] = (),
    ) -> None:
        training = training_of(model, spec.optimizer)
        spec = replace(spec, updates=update)
        require_coverage(training, spec, max_grad_norm)
        check_rate(defaults["lr"])
        self.check_options(defaults)
        check_clipping(max_grad_norm)
        check_schedule_by(schedule_by)
        budget = None if host_budget is None else parse_bytes(host_budget)
        self.spec = spec
        self._model = training
        self._no_decay = tuple(no_decay)
        self._updates = 0  # seeds stochastic rounding
        self._warned: set[tuple[str, ...]] = set()
        self._scale: Tensor | None = None  # of the gradients, in the step under way
        self.max_grad_norm = max_grad_norm
        self.last_grad_norm: Tensor | None = None
        self.schedule_by = schedule_by
        self.last_rates: tuple[float | Tensor, ...] = ()
        self._sweep_rates = SweepRates()
        training.check()
        super().__init__(parameter_groups(training, no_decay), defaults)
        self._states = StagedStates(training, spec, self.state, self._parameters(), budget, smaller)
        self._pieces: PieceUpdates | None = None
        self.register_state_dict_pre_hook(_settle)
        self.register_state_dict_post_hook(_export)
        ownership.allow(self)
        training.expect(self)

    @abstractmethod
    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise `OptionError` for an option of a group, beside its rate, that is out of range."""

    def unread(self, options: Mapping[str, Any]) -> frozenset[str]:
        """The states that updates with a group's options do not read, so that a checkpoint may lack them."""
        return frozenset()

    def numbers_of(self, parameter: Tensor) -> tuple[Number, ...]:
        """The numbers that are kept of runs of a parameter's indices, beside step counts."""
        return ()

    @abstractmethod
    def prepare(
        self, entries: Sequence[StagedSlice], options: Mapping[str, Any], scale: Tensor | None, seed: int
    ) -> Update:
        """The update of one group's slices, whose gradients count times ``scale`` (0-d).

        ``seed``, for stochastic rounding, differs from call to call.
        """

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the active slices that have a gradient, then count the step and move to the next chunk when due.

        A chunk of which no slice got a gradient from a backward pass (its weights had no part in the batch) counts its
        step too, with a warning that names the slices. Without any backward since the last step nothing happens and no
        step is counted. ``closure`` re-evaluates the model and returns the loss, which is returned. Everything is
        checked before the first weight changes. Raises `OptimizerConflict` if another optimizer was
        made for the model, `OutsideGradient` if gradients came, but none through the compiled module,
        `OptimizerMismatch`, `OptionError` for a hyperparameter out of range, and what `CompiledModule.check` raises.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._model.lock, self._model.ranks.failing():
            self._step()
        return loss

    def _check_groups(self, active: Sequence[ActiveSlice]) -> None:
        for group in self.param_groups:
            check_rate(group["lr"])
            self.check_options(group)
            refuse_switches(group, self.switches, f"chunkft_fx.{self.spec.optimizer}")
            refuse_strangers(group, self._states)
        check_clipping(self.max_grad_norm)
        check_schedule_by(self.schedule_by)
        check_slices(active, self.param_groups, self._model.compute_device, self.spec)

    def _step(self) -> None:
        refuse_replaced(self._model, self, self.spec.optimizer)
        self.refuse_partial_step()
        self._model.check()
        active = self._active_slices()
        graded = [s for s in active if s.grad is not None]
        arrivals = self._model.arrivals
        refuse_outside(arrivals)
        if not graded and not arrivals.through:
            return
        self._check_groups(active)
        require_coverage(self._model, self.spec, self.max_grad_norm)
        self._scale = None
        if self.max_grad_norm is not None and graded:
            self.last_grad_norm, self._scale = clip_factor(graded, self.max_grad_norm)
        pieces = self.updates
        if pieces is not None:
            self._step_pieces(pieces, active, graded)
            return
        taken = turn(self.schedule_by, self._sweep_rates, self.param_groups, self._model.schedule)
        if not graded:
            warn_without_gradient(active, self._warned)
        self._states.announce(active)
        states = self._states.staged(active)
        entries = []
        for s in graded:
            own = self._states.own(s)
            if own is not None:
                counts = self._states.counts(own)
                gradient = within_slice(s, own)
                entries.append(StagedSlice(own.slice, s.parameter, own.weight(), gradient, states[s.name], counts))
        updates = self._prepared(entries, rates=taken.rates)
        self._states.will_change()
        for update in updates:
            update.apply()
        self._updates += 1
        for entry in entries:
            self._states.count(entry)
        self._states.spread(graded)
        written = after_host_weights(graded, self.stage.device)
        self._sweep_rates, self.last_rates = taken.after, taken.rates or rates_now(self.param_groups)
        if self._model.advance(taken.takes_turn):
            self._states.announce(self._model.active_slices())
        if written is not None:
            written.synchronize()

    def _step_pieces(self, pieces: PieceUpdates, active: Sequence[ActiveSlice], graded: Sequence[ActiveSlice]) -> None:
        """The step where every one covers all parameters: updates those that the backward has not updated itself."""
        pieces.refuse_late(graded)
        if not graded and not self._model.arrivals.updated:
            warn_without_gradient(active, self._warned)
        if graded:
            pieces.at_step(self._fixed_apply())
            self._updates += 1
        if not self._model.late.is_under_way:
            pieces.settle()
        written = after_host_weights(active, self._model.compute_device)
        self.last_rates = rates_now(self.param_groups)
        self._model.advance()
        if written is not None:
            written.synchronize()

    def _prepared(self, entries: Sequence[StagedSlice], rates: Sequence[float] | None = None) -> list[Update]:
        """The updates of these slices, by parameter group, with its rate if it is another than the group's."""
        groups = [g if rates is None else g | {"lr": rates[i]} for i, g in enumerate(self.param_groups)]
        return list(self._each(entries, groups, self._scale, self._updates))

    def _each(
        self, entries: Sequence[StagedSlice], groups: Sequence[Mapping[str, Any]], scale: Tensor | None, number: int
    ) -> Iterator[Update]:
        for i, group in enumerate(groups):
            names = set(group["param_names"])
            own = [e for e in entries if e.slice.name in names]
            yield self.prepare(own, group, scale, number * len(groups) + i)

    def _apply(self, entries: Sequence[StagedSlice], piece: int) -> None:
        self._fixed_apply()(entries, piece)

    def _fixed_apply(self) -> Apply:
        """The update by options as they are now, whenever it is done; pieces of one step have seeds of their own."""
        groups = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in g.items()} for g in self.param_groups]
        scale, number = self._scale, self._updates

        def apply(entries: Sequence[StagedSlice], piece: int) -> None:
            for update in [*self._each(entries, groups, scale, number + (piece << 40))]:
                update.apply()

        return apply

    @property
    def updates(self) -> PieceUpdates | None:
        """The updates of the pieces of the model's plan; None where a step trains one chunk."""
        known = self._model.known_plan
        if known is None or not known.policy.pieces:
            return None
        ring = self._states.ring()
        if self._pieces is None or not self._pieces.is_of(known.policy.pieces, ring):
            self._pieces = PieceUpdates(self._model, self._states, ring, known.policy.pieces, self._apply)
        return self._pieces

    def refuse_partial_step(self) -> None:
        """Raise `PartialStep` if a step was left halfway, so that some parameters are ahead of the others."""
        if self._pieces is not None:
            self._pieces.refuse_broken()

    def begin_backward(self) -> None:
        """Check, before a backward updates weights, all that a step checks."""
        refuse_replaced(self._model, self, self.spec.optimizer)
        self._check_groups(self._active_slices())

    def end_backward(self) -> None:
        """Count a backward that has updated weights."""
        self._updates += 1

    def accept_partial_step(self) -> None:
        """Go on from a step that failed after it had updated some of the parameters, which `PartialStep` told of."""
        if self._pieces is not None:
            self._pieces.accept()

    def finish_updates(self) -> None:
        """Return when the updates of ``update="late"`` are done, for what reads weights past torch's functions."""
        self._model.late.synchronize()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by `torch.amp.GradScaler.step`, which ends in a bare assertion where no parameter has a gradient.

        Raises `NoGradientToScale` where that is because the batch has no part for the active chunk's slices.
        """
        refuse_scaled_backward(self.spec)
        refuse_scaling(self._model.arrivals, self._active_slices())
        return False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or fill them with zeros in place."""
        self._model.check()
        for p in self._parameters():
            drop_used(p)
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused with `OptionError` once this optimizer is made: its parameters are those that the model trains."""
        if hasattr(self, "_states"):
            raise OptionError(
                "a group cannot be added: this optimizer holds exactly the parameters that the compiled module trains; "
                "give other parameters an optimizer of their own"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Refused with `OptimizerMismatch`: a copy would have no model."""
        raise OptimizerMismatch(
            "an optimizer of a compiled module cannot be copied or pickled, since it belongs to that module; save its "
            f"state_dict(), and load it into a chunkft_fx.{self.spec.optimizer} made for the other module"
        )

    @property
    def has_begun(self) -> bool:
        """Whether there are states that a step or a checkpoint made."""
        return self._updates > 0 or any(run.step for s in self.state.values() for run in s["slice_steps"])

    def follow(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Hold these parameters of the model: states of those of a known name go on, the others have none yet.

        Called by the model when it changed. Raises `HostMemoryExceeded`, before anything changes, if host memory cannot
        hold the states.
        """
        grouped = regrouped(self.param_groups, parameters, self._no_decay)
        before = {n: p for g in self.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}
        more = None
        if self.has_begun:
            new = [p for n, p in parameters.items() if n not in before and any(n in names for names in grouped)]
            more = self._states.places(new) if new else None
        self.drop_stage()
        for group, names in zip(self.param_groups, grouped, strict=True):
            group["params"], group["param_names"] = [parameters[n] for n in names], list(names)
        if self.has_begun:
            self._states.rename(before, parameters, more)
        else:
            self._states.begin_anew(self._parameters())

    @property
    def stage(self) -> Stage:
        """Where the active slices' states are updated."""
        return self._states.stage

    @property
    def untaken_nbytes(self) -> int:
        """Bytes of host memory that states are still to take."""
        return self._states.untaken_nbytes

    def take_stage(self) -> None:
        """Take memory for the states of the largest chunk where the model runs, unless it is taken."""
        self._states.take_stage()

    def drop_stage(self) -> None:
        """Give the stage's memory back; it is taken anew, for the chunks that there are then."""
        self._model.late.finish()
        self.refuse_partial_step()
        self._states.drop_stage()
        self._pieces = None

    def snapshot(self) -> tuple[dict[str, Any], StagedStates]:
        """All of a checkpoint but the states, and what holds these: host memory has them as they are now."""
        _settle(self)
        return without_states(self.param_groups, self._entry()), self._states

    def _entry(self) -> dict[str, Any]:
        position = self._model.schedule_position()
        return describe(self.param_groups, position, self._updates, self._sweep_rates)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, cut into any number of chunks, or of torch's of the same name.

        The given tensors are copied. The schedule continues where it was saved if the number of chunks is
        the same, and begins a new sweep with a `ChunkFTWarning` if it is not. Gradients that are there stay, unless
        another chunk becomes active. Without saved master weights the parameters themselves are the masters. Where
        saved masters lie halfway between two bfloat16, parameters take at the next step or save the rounding of this
        optimizer's format of masters. States in another format than this optimizer's become those of its own, narrower
        ones by rounding to the nearest. States that no update reads under the saved options (``exp_avg`` with
        ``betas[0] == 0``) may be missing, and begin as zeros. With ``states="reset"`` nothing but the schedule is
        saved, and only it and the options are loaded: the active chunk starts anew. Raises `CheckpointMismatch`, before
        anything changes, for a checkpoint of another model or optimizer, with float64 states for parameters that are
        not float64, with states that this optimizer cannot keep, or with a position that means something else under
        this order, seed, interval or way of cutting.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        self._model.late.finish()
        self._model.check()
        checkpoint = read(state_dict, self)
        if checkpoint.position is not None:
            self._model.resume(checkpoint.position)
        parameters = self._parameters()
        self.accept_partial_step()
        self._states.replace({parameters[i]: saved for i, saved in checkpoint.states.items()}, parameters)
        self._updates, self._sweep_rates = checkpoint.updates, checkpoint.rates
        for group, options in zip(self.param_groups, checkpoint.options, strict=True):
            group.update(options)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _active_slices(self) -> tuple[ActiveSlice, ...]:
        try:
            return self._model.active_slices()
        except NotPlanned:
            return ()  # no batch yet, so no gradient either

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


def _settle(optimizer: Optimizer) -> None:
    """Bring host memory up to date, masters of slices that were never active included."""
    assert isinstance(optimizer, ChunkedOptimizer)
    optimizer._model.late.finish()
    optimizer.refuse_partial_step()
    optimizer._model.check()
    optimizer._states.settle()


def _export(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Complete torch's state dict with what is needed to load it.

    States that are not kept are left out: they start anew at each activation.
    """
    assert isinstance(optimizer, ChunkedOptimizer)
    refuse_ranks(optimizer._model.ranks)
    parameters, spec = optimizer._parameters(), optimizer.spec
    states = exported(state_dict["state"], parameters, spec, optimizer.numbers_of) if spec.is_kept else {}
    return state_dict | {"state": states, ENTRY: optimizer._entry()}

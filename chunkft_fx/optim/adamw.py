"""AdamW over the active chunk: states of all chunks in host memory, or of the active one alone; steps per slice.

On the CPU the update is torch's own functional AdamW, applied to the active slices. With one chunk and float32
weights, parameters therefore equal those of ``torch.optim.AdamW`` to the bit. On CUDA a fused kernel does it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast, overload

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.optimizer import Optimizer

from chunkft_fx.bytes import parse_bytes
from chunkft_fx.copies.state_stage import FreshStage, Stage, make_stage
from chunkft_fx.errors import (
    ChunkFTWarning,
    NoGradientToScale,
    NotPlanned,
    OptimizerConflict,
    OptimizerMismatch,
    OptionError,
    OutsideGradient,
)
from chunkft_fx.following import ownership
from chunkft_fx.gradients.slices import ActiveSlice
from chunkft_fx.graph.layout import front, size_along
from chunkft_fx.module.module import training_of
from chunkft_fx.optim.checkpoint import ENTRY, describe, exported, fill_masters, read
from chunkft_fx.optim.groups import (
    check_clipping,
    check_group,
    check_hyperparameters,
    check_slices,
    parameter_groups,
    regrouped,
)
from chunkft_fx.optim.host_states import HostStates, require_room
from chunkft_fx.optim.step_counts import Counts, counted, uniform
from chunkft_fx.optim.update import GroupUpdate, StagedSlice
from chunkft_fx.plan.chunk import Slice
from chunkft_fx.plan.cuts import cut_dim
from chunkft_fx.plan.state_spec import moment_dtype, stage_capacity_nbytes, state_dtypes

STATES = ("keep", "reset")


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on the active slices of a compiled module.

    ``no_decay`` holds glob patterns of parameter names (``"*.bias"``) that get no weight decay, in a second
    parameter group. ``max_grad_norm`` clips the global norm over the active chunk's gradients, as the update
    reads them: the gradients themselves stay as they are. ``last_grad_norm`` (a 0-d tensor on their device)
    is the norm before. As with ``torch.nn.utils.clip_grad_norm_``, a norm that is not finite is not masked:
    check it if your gradients can overflow.

    The state of a parameter begins with the first activation of one of its slices: ``exp_avg`` and
    ``exp_avg_sq`` in ``state_dtype``, and for bfloat16 and float16 parameters a float32 ``master`` weight
    of which the parameter is the rounded copy. A parameter that was changed from outside wins over its
    master. ``state_dtype="bfloat16"`` takes 8 instead of 12 bytes of state for a low-precision element and
    rounds stochastically, so that the second moment still decays; float64 parameters keep float64 moments.

    ``states="keep"`` keeps the states of all chunks in host memory, pinned and copied asynchronously when the
    model runs on CUDA. They may take ``host_budget`` (bytes or ``"64GB"``), by default what memory is available.
    ``states="reset"`` keeps none there: a chunk starts with zero moments, step count 0 and its weights as
    masters whenever it becomes active, as in BAdam (arXiv 2404.02827), or when the model moves to another device.

    Raises `OptimizerMismatch` for anything but a module returned by `chunkft_fx.compile`, `OptionError`
    for an option out of range, `BudgetParseError` for a ``host_budget`` that is not bytes,
    `HostMemoryExceeded` if it cannot hold the states, `NoTrainableParameters`.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float | None = None,
        no_decay: Sequence[str] = (),
        state_dtype: str = "float32",
        states: str = "keep",
        host_budget: int | str | None = None,
    ) -> None:
        training = training_of(model, "AdamW")
        check_hyperparameters(lr, betas, eps, weight_decay)
        check_clipping(max_grad_norm)
        if states not in STATES:
            raise OptionError(f"states={states!r} is not known; choose one of {', '.join(STATES)}")
        self._model = training
        self._moments = moment_dtype(state_dtype)
        self._resets = states == "reset"
        self._host_budget = None if host_budget is None else parse_bytes(host_budget)
        self._no_decay = tuple(no_decay)
        self._updates = 0  # seeds stochastic rounding
        self._stage = self._idle_stage()
        self._staged: list[Slice] = []
        self._modified = False  # the stage holds newer values than host memory
        self._warned: set[tuple[str, ...]] = set()
        self.state_dtype = state_dtype
        self.states = states
        self.max_grad_norm = max_grad_norm
        self.last_grad_norm: Tensor | None = None
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        training.check()
        super().__init__(parameter_groups(training, no_decay), defaults)
        self._kept = [self._host_states(self._parameters())]
        self.register_state_dict_pre_hook(_settle)
        self.register_state_dict_post_hook(_export)
        ownership.allow(self)
        training.expect(self)

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
        checked, and memory taken, before the first weight changes. Raises `OptimizerConflict` if another optimizer was
        made for the model, `OutsideGradient` if gradients came, but none through the compiled module,
        `OptimizerMismatch`, `OptionError` for a hyperparameter out of range, and what `CompiledModule.check` raises.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._model.lock:
            self._step()
        return loss

    def _step(self) -> None:
        if self._model.optimizer is not self:
            raise OptimizerConflict(
                "another chunkft_fx.AdamW was made for this model after this one, and the model follows that one; step "
                "the latest, and keep one optimizer for a model"
            )
        self._model.check()
        active = self._active_slices()
        graded = [s for s in active if s.grad is not None]
        arrivals = self._model.arrivals
        if arrivals.outside and not arrivals.through:
            raise OutsideGradient(
                "parameters have gradients, but none came through the compiled module since the last step: the loss "
                "was computed with the plain model, or with parts of it such as model.base_model and model.lm_head; "
                "call the module that chunkft_fx.compile returned, and take the loss that it returns"
            )
        if not graded and not arrivals.through:
            return
        for group in self.param_groups:
            check_group(group)
            self._refuse_strangers(group)
        check_clipping(self.max_grad_norm)
        check_slices(active, self.param_groups, self._model.compute_device)
        if not graded:
            self._warn_without_gradient(active)
        self._announce(active)
        states = self._by_slice(active)
        scale = None if self.max_grad_norm is None or not graded else self._clip_factor(graded, self.max_grad_norm)
        updates = []
        for i, group in enumerate(self.param_groups):
            names = set(group["param_names"])
            entries = [StagedSlice(s, states[s.name], self._counts(s)) for s in graded if s.name in names]
            updates.append(GroupUpdate(entries, group, scale, self._updates * len(self.param_groups) + i))
        self._modified = True
        for update in updates:
            update.apply()
        self._updates += 1
        for s in graded:
            self.state[s.parameter]["slice_steps"] = counted(self._counts(s), s.start, s.length)
        written = self._after_host_weights(graded)
        if self._model.advance():
            self._announce(self._model.active_slices())
        if written is not None:
            written.synchronize()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by `torch.amp.GradScaler.step`, which ends in a bare assertion where no parameter has a gradient.

        Raises `NoGradientToScale` where that is because the batch has no part for the active chunk's slices.
        """
        active = self._active_slices()
        if self._model.arrivals.through and all(s.grad is None for s in active):
            raise NoGradientToScale(
                f"no gradient reached the active chunk ({', '.join(s.name for s in active[:5])}): its weights have no "
                "part in the loss of this batch, and a gradient scaler cannot step without one; for such a batch call "
                "optimizer.step() itself, and neither scaler.step nor scaler.update: the sweep then moves on "
                "(any(s.grad is not None for s in model.active_slices()) tells); or train in bfloat16, without a scaler"
            )
        return False

    def _refuse_strangers(self, group: Mapping[str, Any]) -> None:
        for i, p in enumerate(group["params"]):
            if not any(states.holds(p) for states in self._kept):
                raise OptionError(
                    f"param_groups has a tensor of shape {list(p.shape)} (number {i} of its group) which the compiled "
                    "module does not train, and which would stay as it is; give it an optimizer of its own"
                )

    def _warn_without_gradient(self, active: Sequence[ActiveSlice]) -> None:
        names = tuple(s.name for s in active)
        if names in self._warned:
            return
        self._warned.add(names)
        warnings.warn(
            f"no gradient reached the active chunk ({', '.join(names[:5])}{' and others' * (len(names) > 5)}): its "
            "weights have no part in the loss of this batch, or were frozen; the step is counted, nothing is updated",
            ChunkFTWarning,
            stacklevel=5,
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or fill them with zeros in place."""
        self._model.check()
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused with `OptionError` once this optimizer is made: its parameters are those that the model trains."""
        if hasattr(self, "_kept"):
            raise OptionError(
                "a group cannot be added: this optimizer holds exactly the parameters that the compiled module trains; "
                "give other parameters an optimizer of their own"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Refused with `OptimizerMismatch`: a copy would have no model."""
        raise OptimizerMismatch(
            "an optimizer of a compiled module cannot be copied or pickled, since it belongs to that module; save its "
            "state_dict(), and load it into a chunkft_fx.AdamW made for the other module"
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
        kept = self._kept
        if self.has_begun:
            new = [p for n, p in parameters.items() if n not in before and any(n in names for names in grouped)]
            kept = [*kept, self._host_states(new)] if new else kept
        self._write_back()
        self._stage.synchronize()
        self._stage, self._staged, self._modified = self._idle_stage(), [], False
        for group, names in zip(self.param_groups, grouped, strict=True):
            group["params"], group["param_names"] = [parameters[n] for n in names], list(names)
        if not self.has_begun:
            self.state.clear()
            self._kept = []
            self._kept = [self._host_states(self._parameters())]
            return
        for name, old in before.items():
            new_one = parameters.get(name)
            if new_one is not None and new_one is not old and old in self.state:
                self.state[new_one] = self.state.pop(old)
            if new_one is not None:
                for states in kept:
                    states.rename(old, new_one)
        self._kept = kept

    @property
    def stage(self) -> Stage:
        """Where the active slices' states are updated."""
        return self._stage

    def take_stage(self) -> None:
        """Take memory for the states of the largest chunk where the model runs, unless it is taken."""
        device = self._model.compute_device
        if device == self._stage.device:
            return
        self._write_back()
        self._stage.synchronize()
        self._stage, self._staged = self._make_stage(device), []

    def drop_stage(self) -> None:
        """Give the stage's memory back; it is taken anew, for the chunks that there are then."""
        self._write_back()
        self._stage.synchronize()
        self._stage, self._staged = self._idle_stage(), []

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, cut into any number of chunks, or of ``torch.optim.AdamW``.

        The given tensors are copied. The schedule continues where it was saved if the number of chunks is
        the same, and begins a new sweep with a `ChunkFTWarning` if it is not. Without saved master weights the
        parameters themselves are the masters. With ``states="reset"`` nothing but the schedule is saved, and only it
        and the options are loaded: the active chunk starts anew. Raises `CheckpointMismatch`, before anything
        changes, for a checkpoint of another model or optimizer, with states that ``state_dtype`` would round, or
        with a position that means something else under this order, seed, interval or way of cutting.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        self._model.check()
        checkpoint = read(state_dict, self.param_groups, self._moments)
        if checkpoint.position is not None:
            self._model.resume(checkpoint.position)
        self._stage.synchronize()
        self._stage = self._idle_stage()  # lets go of the old states, of which there must not be two
        self._staged, self._modified = [], False
        self.state.clear()
        self._kept = []
        self._kept = [self._host_states(self._parameters())]
        self._updates = checkpoint.updates
        parameters = self._parameters()
        for i, saved in () if self._resets else checkpoint.states.items():
            state = self._state_of(parameters[i])
            for key, value in saved.tensors.items():
                state[key].copy_(value)
            state["slice_steps"] = saved.counts
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

    def _is_pinned(self) -> bool:
        return self._model.compute_device.type == "cuda"

    def _host_states(self, parameters: Sequence[Tensor]) -> HostStates:
        """The places of these parameters' states; `HostMemoryExceeded` if there is no room for them."""
        states = HostStates(parameters, self._moments)
        if not self._resets:
            require_room(states, self._is_pinned(), self._host_budget, self._moments)
        return states

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        """A parameter's state, made when it is first asked for; tensors only where host memory keeps them."""
        if parameter not in self.state:
            size = size_along(parameter, cut_dim(parameter.shape))
            kept = next(states for states in self._kept if states.holds(parameter))
            tensors = {} if self._resets else kept.zeros(parameter, self._is_pinned())
            self.state[parameter] = {"slice_steps": uniform(size), **tensors}
        return cast(dict[str, Any], self.state[parameter])

    def _counts(self, s: ActiveSlice) -> Counts:
        return cast(Counts, self.state[s.parameter]["slice_steps"])

    def _announce(self, active: Sequence[ActiveSlice]) -> None:
        """Have the states of these slices brought to where the model runs, unless they are there.

        They come as the programs of the next step let them, the rest when the update asks for them.
        """
        device = self._model.compute_device
        slices = [s.slice for s in active]
        if slices == self._staged and device == self._stage.device:
            return
        self._write_back()
        self._staged = []
        self.take_stage()
        if self._resets:
            self.state.clear()
        self._stage.announce([host for s in active for host in self._host(s)])
        self._staged = slices

    def _idle_stage(self) -> Stage:
        """The stage before anything is announced: it takes no memory."""
        cpu = torch.device("cpu")
        return FreshStage(cpu, 0) if self._resets else Stage(cpu)

    def _make_stage(self, device: torch.device) -> Stage:
        if self._resets:
            return FreshStage(device, self._capacity())
        return make_stage(device, self._capacity())

    def _host(self, s: ActiveSlice) -> list[Tensor]:
        """A slice's states in host memory; for states that are not kept, tensors without memory."""
        state, dtypes = self._state_of(s.parameter), state_dtypes(s.parameter, self._moments)
        if self._resets:
            shape = front(s.weight(), s.dim).shape
            return [torch.empty(shape, dtype=d, device="meta") for d in dtypes.values()]
        return [front(state[key], s.dim).narrow(0, s.start, s.length) for key in dtypes]

    def _by_slice(self, active: Sequence[ActiveSlice]) -> dict[str, dict[str, Tensor]]:
        """The staged tensors by parameter name and state name, in the order in which they were announced."""
        rest = iter(self._stage.tensors())
        return {s.name: {key: next(rest) for key in state_dtypes(s.parameter, self._moments)} for s in active}

    def _write_back(self) -> None:
        if self._modified:
            self._stage.write_back()
            self._modified = False

    def _capacity(self) -> int:
        """Bytes of the largest chunk's states on the stage."""
        parameters = dict(self._model.named_parameters())
        return max(stage_capacity_nbytes(c, parameters, self.state_dtype) for c in self._model.plan.chunks)

    def _clip_factor(self, graded: Sequence[ActiveSlice], max_norm: float) -> Tensor:
        """What the gradients are multiplied by, as torch.nn.utils.clip_grads_with_norm_ has it."""
        self.last_grad_norm = get_total_norm([s.grad for s in graded if s.grad is not None])
        return torch.clamp(max_norm / (self.last_grad_norm + 1e-6), max=1.0)

    def _after_host_weights(self, graded: Sequence[ActiveSlice]) -> torch.cuda.Event | None:
        """An event after the update, if it writes weights in host memory, which anyone may read after ``step``."""
        if not self._is_pinned() or all(s.parameter.is_cuda for s in graded):
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._stage.device))
        return event


def _settle(optimizer: Optimizer) -> None:
    """Bring host memory up to date, masters of slices that were never active included."""
    assert isinstance(optimizer, AdamW)
    optimizer._model.check()
    optimizer._write_back()
    optimizer._stage.synchronize()
    fill_masters(optimizer.state)


def _export(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Complete torch's state dict with what is needed to load it.

    States that are not kept are left out: they start anew at each activation.
    """
    assert isinstance(optimizer, AdamW)
    entry = describe(optimizer.param_groups, optimizer._model.schedule_position(), optimizer._updates)
    states = {} if optimizer._resets else exported(state_dict["state"])
    return state_dict | {"state": states, ENTRY: entry}

"""AdamW over the active chunk: float32 states of all chunks in host memory, step counts per slice.

The update is torch's own functional AdamW, applied to the active slices. With one chunk and float32
weights on the CPU, parameters therefore equal those of ``torch.optim.AdamW`` to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

from chunkft_fx.cuts import cut_dim
from chunkft_fx.errors import NotPlanned, OptimizerMismatch, OptionError
from chunkft_fx.host_memory import HostMemory
from chunkft_fx.optim_checkpoint import ENTRY, describe, read
from chunkft_fx.optim_groups import ChunkedModule, check_hyperparameters, parameter_groups, require_chunked
from chunkft_fx.optim_state import front, new_state, reconcile, state_dtype, state_keys
from chunkft_fx.plan import Slice
from chunkft_fx.slices import ActiveSlice
from chunkft_fx.step_counts import counted, within
from chunkft_fx.streaming import CudaStage, Stage, stage_nbytes


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on the active slices of a compiled module.

    ``no_decay`` holds glob patterns of parameter names (``"*.bias"``) that get no weight decay, in a second
    parameter group. ``max_grad_norm`` clips the global norm over the active chunk's gradients, in place;
    ``last_grad_norm`` (a 0-d tensor on their device) is the norm before. As with
    ``torch.nn.utils.clip_grad_norm_``, a norm that is not finite is not masked: check it if your
    gradients can overflow.

    The state of a parameter begins with the first activation of one of its slices: ``exp_avg`` and
    ``exp_avg_sq`` in float32 (float64 for float64 parameters), and for other dtypes a ``master`` weight
    of which the parameter is the rounded copy. A parameter that was changed from outside wins over its
    master. States live in host memory, pinned and copied asynchronously when the weights are on CUDA.

    Raises `OptimizerMismatch` for anything but a module returned by `chunkft_fx.compile`, `OptionError`
    for a hyperparameter out of range, `NoTrainableParameters`.
    """

    def __init__(
        self,
        model: ChunkedModule,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float | None = None,
        no_decay: Sequence[str] = (),
    ) -> None:
        require_chunked(model)
        check_hyperparameters(lr, betas, eps, weight_decay, max_grad_norm)
        self._model = model
        self._memory = HostMemory()
        self._stage = Stage(torch.device("cpu"))
        self._staged: list[Slice] = []
        self._modified = False  # the stage holds newer values than host memory
        self.max_grad_norm = max_grad_norm
        self.last_grad_norm: Tensor | None = None
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameter_groups(model, no_decay), defaults)
        self.register_state_dict_pre_hook(_settle)
        self.register_state_dict_post_hook(_export)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the active slices that have a gradient, then count the step and move to the next chunk when due.

        Without any gradient nothing happens and no step is counted. ``closure`` re-evaluates the model and
        returns the loss, which is returned. Everything is checked before the first weight changes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = self._active_slices()
        graded = [s for s in active if s.grad is not None]
        if not graded:
            return loss
        self._check(active)
        self._fetch(active)
        states = _by_slice(active, self._stage.tensors())
        if self.max_grad_norm is not None:
            self._clip(graded, self.max_grad_norm)
        self._modified = True
        for group in self.param_groups:
            names = set(group["param_names"])
            self._update(group, [(s, states[s.name]) for s in graded if s.name in names])
        if self._model.advance():
            self._fetch(self._model.active_slices())
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked for by ``torch.amp.GradScaler.step``: a scaler looks for gradients on parameters, where none are."""
        raise OptionError(
            "torch.amp.GradScaler does not see the gradients of active slices; use bfloat16, which needs no scaler"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the active slices' gradients, or fill them with zeros in place."""
        super().zero_grad(set_to_none)
        for s in self._active_slices():
            if set_to_none:
                s.grad = None
            elif s.grad is not None:
                s.grad.zero_()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, cut into any number of chunks, or of ``torch.optim.AdamW``.

        The given tensors are copied. The schedule continues where it was saved if the number of chunks is
        the same. Without saved master weights the parameters themselves are the masters. Raises
        `CheckpointMismatch`, before anything changes, for a checkpoint of another model or optimizer.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        checkpoint = read(state_dict, self.param_groups)
        if checkpoint.position is not None:
            self._model.resume(checkpoint.position)
        self._stage.synchronize()
        self._staged, self._modified = [], False
        self.state.clear()
        self._memory = HostMemory()
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, saved in checkpoint.states.items():
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

    def _check(self, active: Sequence[ActiveSlice]) -> None:
        """Refuse what an update could not finish, before it begins."""
        known = {id(p): n for g in self.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}
        device = self._model.compute_device
        for s in active:
            if known.get(id(s.parameter)) != s.name:
                raise OptimizerMismatch(
                    f"{s.name!r} became trainable or was replaced after this optimizer was made; make a new optimizer"
                )
            if s.parameter.device not in (device, torch.device("cpu")):
                raise OptimizerMismatch(
                    f"{s.name!r} is on {s.parameter.device}, the model runs on {device}; "
                    "a weight must be there or in host memory"
                )
            expected = (s.weight().shape, state_dtype(s.parameter), device)
            if s.grad is not None and (s.grad.shape, s.grad.dtype, s.grad.device) != expected:
                raise OptimizerMismatch(
                    f"the gradient of {s.name!r} is {tuple(s.grad.shape)}, {s.grad.dtype} on {s.grad.device}; "
                    f"it must be {tuple(expected[0])}, {expected[1]} on {device}"
                )

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        """A parameter's state, made when it is first asked for."""
        if parameter not in self.state:
            pinned = self._model.compute_device.type == "cuda"
            self.state[parameter] = new_state(parameter, self._memory, pinned)
        return cast(dict[str, Any], self.state[parameter])

    def _fetch(self, active: Sequence[ActiveSlice]) -> None:
        """Begin to bring the states of these slices to where their weights are, unless they are there."""
        device = self._model.compute_device
        slices = [s.slice for s in active]
        if slices == self._staged and device == self._stage.device:
            return
        self._write_back()
        self._staged = []
        if device != self._stage.device:
            self._stage.synchronize()
            self._stage = CudaStage(device, self._capacity()) if device.type == "cuda" else Stage(device)
        self._stage.fetch([host for s in active for host in self._host(s)])
        self._staged = slices

    def _host(self, s: ActiveSlice) -> list[Tensor]:
        state = self._state_of(s.parameter)
        return [front(state[key], s.dim).narrow(0, s.start, s.length) for key in state_keys(s.parameter)]

    def _write_back(self) -> None:
        if self._modified:
            self._stage.write_back()
            self._modified = False

    def _capacity(self) -> int:
        """Bytes of the largest chunk's states on the stage."""
        parameters = dict(self._model.named_parameters())

        def nbytes(name: str, length: int, size: int) -> int:
            p = parameters[name]
            return stage_nbytes(p.numel() // size * length * state_dtype(p).itemsize) * len(state_keys(p))

        return max(sum(nbytes(s.name, s.length, s.size) for s in c.slices) for c in self._model.plan.chunks)

    def _clip(self, graded: Sequence[ActiveSlice], max_norm: float) -> None:
        self.last_grad_norm = get_total_norm([s.grad for s in graded if s.grad is not None])
        clip_grads_with_norm_(cast(list[Tensor], graded), max_norm, self.last_grad_norm)  # reads only .grad

    def _update(self, group: Mapping[str, Any], entries: Sequence[tuple[ActiveSlice, dict[str, Tensor]]]) -> None:
        """Update one group's slices; a slice in which step counts differ is updated run by run."""
        masters: list[Tensor] = []
        gradients: list[Tensor] = []
        averages: list[Tensor] = []
        squares: list[Tensor] = []
        steps: list[Tensor] = []
        weights: list[tuple[Tensor, Tensor]] = []
        for s, staged in entries:
            home, gradient = front(s.weight(), s.dim), front(cast(Tensor, s.grad), s.dim).contiguous()
            weight = home.to(gradient.device)  # a streamed weight is brought in, and taken back below
            # one layout for all operands: fused kernels demand it, and vectorised loops round the same way
            master = staged["master"] if "master" in staged else weight.contiguous()
            if "master" in staged:
                reconcile(master, weight)
            weights.append((home, master))
            for run in within(self.state[s.parameter]["slice_steps"], s.start, s.length):
                part = slice(run.start - s.start, run.start - s.start + run.length)
                masters.append(master[part])
                gradients.append(gradient[part])
                averages.append(staged["exp_avg"][part])
                squares.append(staged["exp_avg_sq"][part])
                steps.append(torch.full((), run.step, dtype=torch.float32, device=weight.device))
        adamw(
            masters,
            gradients,
            averages,
            squares,
            [],
            steps,
            fused=True if self._stage.device.type == "cuda" else None,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for weight, master in weights:
            if master is not weight:
                weight.copy_(master)
        for s, _ in entries:
            state = self.state[s.parameter]
            state["slice_steps"] = counted(state["slice_steps"], s.start, s.length)


def _by_slice(active: Sequence[ActiveSlice], staged: Sequence[Tensor]) -> dict[str, dict[str, Tensor]]:
    """The staged tensors by parameter name and state name, in the order in which they were fetched."""
    rest = iter(staged)
    return {s.name: {key: next(rest) for key in state_keys(s.parameter)} for s in active}


def _settle(optimizer: Optimizer) -> None:
    """Bring host memory up to date, masters of slices that were never active included."""
    assert isinstance(optimizer, AdamW)
    optimizer._write_back()
    optimizer._stage.synchronize()
    for parameter, state in optimizer.state.items():
        dim = cut_dim(parameter.shape)
        for run in state["slice_steps"] if "master" in state else ():
            if run.step == 0:
                weight = front(parameter, dim).narrow(0, run.start, run.length)
                reconcile(front(state["master"], dim).narrow(0, run.start, run.length), weight.cpu())


def _export(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Complete torch's state dict: steps as torch counts them, runs as lists, and what is needed to load it."""
    assert isinstance(optimizer, AdamW)
    states = {}
    for index, state in state_dict["state"].items():
        step = max(run.step for run in state["slice_steps"])
        if step:
            runs = [list(run) for run in state["slice_steps"]]
            states[index] = {"step": torch.tensor(float(step)), **state, "slice_steps": runs}
    try:
        position = optimizer._model.schedule.state_dict()
    except NotPlanned:
        position = None
    return state_dict | {"state": states, ENTRY: describe(optimizer.param_groups, position)}

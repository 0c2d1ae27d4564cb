"""Adafactor: decides what it keeps, and runs its update, in torch's operators and without waiting for the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from chunkft_fx.errors import OptionError
from chunkft_fx.optim import update as updates
from chunkft_fx.optim.groups import is_at_least_0, require_at_least_0
from chunkft_fx.optim.parts import PartsOptimizer
from chunkft_fx.optim.update import Part
from chunkft_fx.plan.state_spec import StateSpec, StateTensor

TENSORS = (
    StateTensor("row_var", of="matrices", mean_over=-1),
    StateTensor("col_var", of="matrices", mean_over=-2),
    StateTensor("variance", of="vectors"),
)
# A low-precision element: its master is compared with it (30), decayed (8), read for its norm (4), moved (12) and
# rounded (6); its gradient is read for two norms (8); what it moves by is made twice where a parameter is large (80)
# and read for its norm (4).
UPDATE_NBYTES = 152


class Adafactor(PartsOptimizer):
    """Adafactor (Shazeer and Stern, arXiv 1804.04235) as `torch.optim.Adafactor` has it, on a compiled module.

    Beside ``lr``, ``beta2_decay``, ``eps``, ``d`` and ``weight_decay`` the options are those that `ChunkedOptimizer`
    describes. Of a matrix, or of the last two dimensions of a larger parameter, the state is a ``row_var`` and a
    ``col_var``, of a vector a ``variance``, all in float32 (float64 for float64 parameters); low-precision parameters
    have a master weight, which is then nearly all that host memory keeps: 4 bytes an element.

    An update is scaled by norms of the whole parameter, and so is its state: chunks are cut between parameters, never
    inside one. A model that was cut otherwise is planned anew when this optimizer is made; `OptimizerMismatch` is
    raised if it has been trained by then, `ChunkCountError` if it has fewer parameters than it was to have chunks.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float | None = None,
        no_decay: Sequence[str] = (),
        states: str = "keep",
        host_budget: int | str | None = None,
        update: str = "step",
        schedule_by: str = "sweep",
    ) -> None:
        defaults = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay}
        super().__init__(
            model,
            StateSpec("Adafactor", TENSORS, states, UPDATE_NBYTES, is_whole=True),
            defaults | {"maximize": False},  # torch's Adafactor cannot step with a checkpoint that does not say so
            max_grad_norm=max_grad_norm,
            no_decay=no_decay,
            host_budget=host_budget,
            update=update,
            schedule_by=schedule_by,
        )

    def check_options(self, options: Mapping[str, Any]) -> None:
        require_at_least_0(options, "weight_decay")
        decay, eps, d = options["beta2_decay"], options["eps"], options["d"]
        if not isinstance(decay, int | float) or not is_at_least_0(-decay):
            raise OptionError(f"beta2_decay={decay!r} must be a number, 0 or less")
        is_pair = isinstance(eps, tuple | list) and len(eps) == 2
        if not is_pair or not is_at_least_0(eps[1]) or not (eps[0] is None or is_at_least_0(eps[0])):
            raise OptionError(f"eps={eps!r} must be two numbers, 0 or more, the first of which may be None")
        if not is_at_least_0(d) or d < 1:
            raise OptionError(f"d={d!r} must be a number, 1 or more")

    def update(self, parts: Sequence[Part], options: Mapping[str, Any]) -> None:
        for part in parts:
            update(part, options)


def update(part: Part, options: Mapping[str, Any]) -> None:
    """One step of Adafactor for a whole parameter, in place; its gradient stays as it is.

    The numbers that scale it stay on the device. A large parameter is moved by a few of its indices at a time.
    """
    weight, gradient, step, lr = part.weight, part.gradient, part.step, options["lr"]
    eps1, eps2 = options["eps"]
    eps1 = torch.finfo(weight.dtype).eps if eps1 is None else eps1
    most = step**-0.5
    rho = lr.clamp(max=most) if isinstance(lr, Tensor) else min(lr, most)
    alpha = (vector_norm(weight) / weight.numel() ** 0.5).clamp(min=eps2) * rho
    if options["weight_decay"]:
        weight.mul_(1 - lr * options["weight_decay"])
    estimate = _observe(part, step ** options["beta2_decay"], eps1)
    places = list(_places(gradient))

    def moves() -> Iterator[tuple[Tensor, Tensor]]:
        for at in places:
            yield weight[at], estimate(at).clamp_(min=eps1 * eps1).rsqrt_().mul_(gradient[at])

    made = list(moves()) if len(places) == 1 else None
    norm = vector_norm(torch.stack([vector_norm(move) for _, move in made or moves()]))
    rate = alpha / (norm / (gradient.numel() ** 0.5 * options["d"])).clamp(min=1)
    for moved, move in made or moves():
        moved.sub_(move.mul_(rate))


def _observe(part: Part, share: float, eps: float) -> Callable[[Any], Tensor]:
    """Let a share of the squared gradient into the states; gives the estimated second moment at some indices, anew."""
    gradient, states = part.gradient, part.states
    if gradient.ndim < 2:
        variance = states["variance"].lerp_(gradient * gradient, share)
        return lambda at: variance[at].clone()
    row, col = states["row_var"], states["col_var"]
    for var, dim in ((row, -1), (col, -2)):
        var.lerp_(vector_norm(gradient, dim=dim, keepdim=True).square_().div_(gradient.shape[dim]), share)
    mean = row.mean(dim=-2, keepdim=True).clamp_(min=eps)
    if gradient.ndim == 2:
        return lambda at: (row[at] @ col).div_(mean)
    return lambda at: (row[at] @ col[at]).div_(mean[at])


def _places(t: Tensor) -> Iterator[slice | EllipsisType]:
    """Ranges of the first dimension that hold `PART_NUMEL` elements each; all of a scalar."""
    if not t.ndim:
        yield ...
        return
    indices = max(1, updates.PART_NUMEL * len(t) // t.numel())
    for start in range(0, len(t), indices):
        yield slice(start, start + indices)

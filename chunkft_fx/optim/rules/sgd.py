"""SGD: decides what it keeps, and runs its update by torch's own functional SGD, on CUDA by its foreach functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim.sgd import sgd

from chunkft_fx.errors import OptionError
from chunkft_fx.optim.groups import is_at_least_0, require_at_least_0
from chunkft_fx.optim.parts import PartsOptimizer
from chunkft_fx.optim.update import Part
from chunkft_fx.plan.state_spec import StateSpec, StateTensor

BUFFER = "momentum_buffer"


class SGD(PartsOptimizer):
    """Stochastic gradient descent as `torch.optim.SGD` has it, on the active slices of a compiled module.

    Beside ``lr``, ``momentum``, ``dampening``, ``weight_decay`` (added to gradients) and ``nesterov`` the options are
    those that `ChunkedOptimizer` describes. With momentum the state of a parameter is a ``momentum_buffer`` in float32
    (float64 for float64 parameters), without there is none; low-precision parameters have a master weight either way.
    A group's momentum can change, but not from or to 0: that decides which states there are. The first update of a
    slice makes its gradient the momentum, as torch does for a parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        max_grad_norm: float | None = None,
        no_decay: Sequence[str] = (),
        states: str = "keep",
        host_budget: int | str | None = None,
        update: str = "step",
        schedule_by: str = "sweep",
    ) -> None:
        has_momentum = self._has_momentum = is_at_least_0(momentum) and momentum > 0
        # Of a low-precision element: decay reads gradient and master and writes a sum (12), the momentum is scaled (8)
        # and added to (12), the master is compared with its weight (30), moved (12) and rounded (6).
        spec = StateSpec(
            "SGD",
            (StateTensor(BUFFER),) if has_momentum else (),
            states,
            update_nbytes=80 if has_momentum else 60,
            saves_steps=False,
        )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(
            model,
            spec,
            defaults,
            max_grad_norm=max_grad_norm,
            no_decay=no_decay,
            host_budget=host_budget,
            update=update,
            schedule_by=schedule_by,
        )

    def check_options(self, options: Mapping[str, Any]) -> None:
        require_at_least_0(options, "momentum", "weight_decay")
        momentum, dampening = options["momentum"], options["dampening"]
        if not isinstance(dampening, int | float) or not abs(dampening) < float("inf"):
            raise OptionError(f"dampening={dampening!r} must be a number")
        if options["nesterov"] and (not momentum or dampening):
            raise OptionError(
                f"nesterov=True needs a momentum above 0 and no dampening, not momentum={momentum!r} and "
                f"dampening={dampening!r}"
            )
        if (momentum > 0) != self._has_momentum:
            made = "with" if self._has_momentum else "without"
            raise OptionError(
                f"momentum={momentum!r} was set in a parameter group of an SGD that was made {made} momentum, which "
                "decides its states; make a new optimizer"
            )

    def update(self, parts: Sequence[Part], options: Mapping[str, Any]) -> None:
        update(parts, options, foreach=parts[0].gradient.is_cuda)


def update(parts: Sequence[Part], options: Mapping[str, Any], foreach: bool) -> None:
    """One step of SGD on these parts, in place; gradients stay as they are."""
    gradients = [part.gradient for part in parts]
    if foreach and options["nesterov"]:
        gradients = [g.clone() for g in gradients]  # the foreach function adds the momentum to them
    buffers = [part.states.get(BUFFER) if part.step > 1 else None for part in parts]
    sgd(
        [part.weight for part in parts],
        gradients,
        buffers,
        foreach=foreach,
        weight_decay=options["weight_decay"],
        momentum=options["momentum"],
        lr=float(options["lr"]),
        dampening=options["dampening"],
        nesterov=options["nesterov"],
        maximize=False,
    )
    for part, buffer in zip(parts, buffers, strict=True):
        if part.step == 1 and buffer is not None:
            part.states[BUFFER].copy_(buffer)

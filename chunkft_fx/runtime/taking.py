"""Runs backward passes whose programs take the gradients of parameters themselves: to update weights, or to keep them.

Such a program takes all of them and passes none through autograd, so what asks autograd for some of them alone, or has
hooks on them, is refused before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from chunkft_fx.copies.states.stage import Updates
from chunkft_fx.copies.waiting_gradients import WaitingGradients
from chunkft_fx.errors import StaleBackward, UnsupportedGraph
from chunkft_fx.planning.batch_plan import PlanOwner
from chunkft_fx.program.instructions import Executable
from chunkft_fx.ranks.ranks import Ranks
from chunkft_fx.runtime.step import Machine, Step, run_backward

# The machine that instructions run on, with what takes gradients.
MachineOf = Callable[[Updates], Machine]


class TakingOwner(PlanOwner, Protocol):
    """What such a backward needs of the compiled module.

    ``waiting`` keeps gradients in host memory, through a ring whose memory ``take_ring`` takes before a step takes
    anything; ``hooked`` names a parameter with a hook of the user's on its gradient, ``frozen`` one that requires no
    gradient any more.
    """

    @property
    def is_accumulating(self) -> bool: ...

    @property
    def waiting(self) -> WaitingGradients | None: ...

    def take_ring(self) -> None: ...

    def hooked(self) -> str | None: ...

    def frozen(self) -> str | None: ...

    def came_through(self, updated: bool = False) -> None: ...


def takes_gradients(executable: Executable) -> bool:
    """Whether a program's backward takes the gradients of parameters itself."""
    return executable.has_updates or executable.keeps_gradients


def run_taking(
    owner: TakingOwner, step: Step, tangents: dict[int, Tensor], machine: MachineOf, is_whole: bool
) -> dict[str, Tensor]:
    """Run such a backward; the gradients of other inputs, by primal.

    ``is_whole`` says that the call is for all gradients, as ``backward()`` is. Raises `UnsupportedGraph` if it is not,
    or where a parameter has hooks, `StaleBackward` if one was frozen since the forward, or if weights can no more be
    updated as the forward expected.
    """
    why = 'update="backward"' if step.executable.has_updates else "they wait in host memory"
    if not is_whole:
        raise UnsupportedGraph(
            "torch.autograd.grad, or a backward with inputs=, asks for some gradients alone, but this plan's program "
            f"takes the gradients of all parameters itself ({why}); call loss.backward()"
        )
    frozen = owner.frozen()
    if frozen is not None:
        raise StaleBackward(
            f"{frozen!r} was frozen between this forward and its backward, whose program takes the gradients of all "
            f"parameters ({why}); freeze before the forward, or call the model again"
        )
    hooked = owner.hooked()
    if hooked is not None:
        raise UnsupportedGraph(
            f"{hooked!r} has a hook on its gradient, which would not be called: this plan's program takes gradients "
            f"itself ({why}); remove the hook, and look at gradients after backward()"
        )
    run = _updating if step.executable.has_updates else _keeping
    return run(owner, step, tangents, machine)


def _updating(owner: TakingOwner, step: Step, tangents: dict[int, Tensor], machine: MachineOf) -> dict[str, Tensor]:
    """Run a backward that updates weights."""
    optimizer = owner.optimizer
    updates = None if optimizer is None else optimizer.updates
    if optimizer is None or updates is None or owner.is_accumulating:
        why = "its backward is inside" if owner.is_accumulating else "its optimizer is gone"
        raise StaleBackward(
            'this forward ran for a backward that updates weights (update="backward"), outside of no_sync(), but '
            f"{why}; put forward and backward into the same no_sync() context, and keep the optimizer"
        )
    optimizer.begin_backward()
    totals = _taken(owner, step, tangents, machine, updates)
    optimizer.end_backward()
    owner.came_through(updated=True)
    return totals


def _keeping(owner: TakingOwner, step: Step, tangents: dict[int, Tensor], machine: MachineOf) -> dict[str, Tensor]:
    """Run a backward that sends gradients to host memory."""
    waiting = owner.waiting
    assert waiting is not None, "a pending backward keeps its plan"
    waiting.average_by((Ranks() if owner.is_accumulating else owner.ranks).average)
    totals = _taken(owner, step, tangents, machine, waiting)
    owner.came_through()
    return totals


def _taken(
    owner: TakingOwner, step: Step, tangents: dict[int, Tensor], machine: MachineOf, taker: Updates
) -> dict[str, Tensor]:
    taker.begin()
    totals = run_backward(step, tangents, machine(taker))
    with owner.residency.presented():  # torch lets a parameter have a gradient on its own device only
        taker.complete()
    return totals

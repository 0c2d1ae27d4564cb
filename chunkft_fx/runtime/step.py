"""Runs a program inside autograd: keeps what backward needs, and hands gradients to the active slices.

Forward and backward are two parts of an `Executable`; the slots that are alive between them belong to one `Step`, which
is everything that a pending backward owns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chunkft_fx import torch_internals
from chunkft_fx.copies.saved_values import SavedValues
from chunkft_fx.copies.states.stage import Stage, Updates
from chunkft_fx.copies.weight_ring import Ring
from chunkft_fx.errors import StaleBackward
from chunkft_fx.gradients.reduction import Reduction
from chunkft_fx.gradients.slices import ActiveSlice
from chunkft_fx.graph import ops
from chunkft_fx.program.instructions import Executable, Instruction, Slot, Slots, StreamNode
from chunkft_fx.program.lower import lower
from chunkft_fx.program.program import RegionCall

# How a forward's values are changed in place before its backward, and what to do instead.
BY_USER = "place since the forward; call backward before optimizer.step(), or call the model again"
BY_UPDATE = (
    'place since the forward, as by another backward, which with update="backward" updates weights; run all but the '
    'last one of a step inside no_sync(), with their forwards, or use update="step"'
)


@dataclass(frozen=True)
class Machine:
    """What instructions run on: how regions are lowered, what carries streamed weights, saved values and states, and
    what updates weights, or keeps gradients, within the backward. ``await_updates`` is called with the index of a
    region before it reads its weights in a forward, while updates of the step before may still run. ``reduction``
    averages gradients over ranks."""

    backend: str
    fake_mode: Any
    ring: Ring | None = None
    saved: SavedValues | None = None
    stage: Stage | None = None
    updates: Updates | None = None
    await_updates: Callable[[int], None] | None = None
    reduction: Reduction | None = None

    def run(self, instruction: Instruction, arguments: list[Any]) -> Sequence[Any]:
        """Run one instruction; a region call may empty its arguments."""
        call = instruction.call
        if isinstance(call, RegionCall):
            if self.await_updates is not None and not call.is_backward:
                self.await_updates(call.region.index)
            return lower(call.variant, self.backend, self.fake_mode, call.is_backward)(arguments)
        if call.is_saved:
            return self._carry(call, arguments)
        if call.target is ops.add_up:
            total, gradient = arguments
            return (total.add_(gradient) if call.number else ops.add_up(arguments),)
        if call.target is ops.reduce:
            assert self.reduction is not None
            return (self.reduction.begin(call.names[0], arguments),)
        if call.target is ops.admit:
            if self.stage is not None:
                self.stage.admit(call.share, () if self.ring is None else (self.ring.link,))
            return ()
        if call.target in ops.PIECE_NODES:
            self._update(call, arguments)
            return ()
        assert self.ring is not None
        if call.target is ops.fetch:
            return self.ring.fetch(arguments, call.number)
        if call.target is ops.wait:
            self.ring.wait(call.number)
        return ()

    def abandon(self) -> None:
        """Put what follows behind all copies under way; called when instructions failed, before values are dropped."""
        for engine in (self.ring, self.saved, self.stage, self.updates):
            if engine is not None:
                engine.abandon()

    def _update(self, call: StreamNode, arguments: list[Any]) -> None:
        assert self.updates is not None
        if call.target is ops.fetch_states:
            self.updates.fetch_states(call.number)
        elif call.target in ops.TAKERS:
            self.updates.update(call.number, call.names, list(arguments), call.group)
        else:
            self.updates.write_states(call.number)

    def _carry(self, call: StreamNode, arguments: list[Any]) -> Sequence[Any]:
        assert self.saved is not None
        if call.target is ops.offload:
            return self.saved.offload(arguments, call.number)
        if call.target is ops.fetch:
            return self.saved.fetch(arguments, call.number)
        finish = self.saved.wait if call.target is ops.wait else self.saved.release
        finish(call.number)
        return ()


def execute(
    instructions: Sequence[Instruction],
    slots: Slots,
    machine: Machine,
    after: Callable[[Slots, Instruction], None],
) -> None:
    """Run instructions over ``slots``, dropping each value with its last use; ``after`` sees every result."""
    try:
        _execute(instructions, slots, machine, after)
    except BaseException:
        machine.abandon()
        raise


def _execute(
    instructions: Sequence[Instruction],
    slots: Slots,
    machine: Machine,
    after: Callable[[Slots, Instruction], None],
) -> None:
    for instruction in instructions:
        arguments = [slots[s] for s in instruction.inputs]
        for s in instruction.last_use:
            del slots[s]
        results = machine.run(instruction, arguments)
        arguments.clear()
        for index, s in instruction.outputs:
            slots[s] = results[index]
        del results
        after(slots, instruction)


@dataclass
class Step:
    """What one forward leaves for its backward: live slots, and what must still hold when it comes.

    ``owner`` is the tuple of active slices at forward time; a backward after a chunk switch has nowhere
    to put its gradients. ``versions`` pairs the tensors that backward reads with their version
    counters, as autograd's own saved tensors do. ``provided`` names the tangents that this step's
    program takes, ``shapes`` describes the outputs; ``replay`` runs the forward again for others. ``is_reduced`` says
    that its gradients are averaged over ranks.
    """

    executable: Executable
    slots: Slots | None
    owner: tuple[ActiveSlice, ...]
    versions: list[tuple[Tensor, int]]
    replay: Callable[[frozenset[str]], Step]
    provided: frozenset[str]
    shapes: list[tuple[torch.Size, torch.dtype, torch.device] | None]
    is_reduced: bool = False

    def zeros(self, output: int) -> Tensor:
        """The gradient of an output that was expected to get one and did not."""
        described = self.shapes[output]
        assert described is not None
        shape, dtype, device = described
        return torch.zeros(shape, dtype=dtype, device=device)

    def let_go(self) -> None:
        """Hold saved activations no longer; no backward can come after that."""
        self.slots = None
        self.versions.clear()

    def check(self, owner: tuple[ActiveSlice, ...]) -> None:
        """Raise `StaleBackward` unless this step can still be run backward."""
        if self.slots is None:
            raise StaleBackward(
                "backward was called a second time for the same forward, whose saved activations are freed; "
                "call the model again, or pass retain_graph=True to the first backward (all outputs of accumulate() "
                "have one backward: add their losses)"
            )
        if owner is not self.owner:
            raise StaleBackward(
                "the active chunk changed between this forward and its backward; "
                "call backward before optimizer.step() or activate(), or call the model again"
            )
        for tensor, version in self.versions:
            if torch_internals.version(tensor) != version:
                why = BY_UPDATE if self.executable.has_updates else BY_USER
                raise StaleBackward(f"a tensor of shape {list(tensor.shape)} that backward needs was changed in {why}")


def run_forward(
    executable: Executable, arguments: Sequence[Any], machine: Machine
) -> tuple[list[Any], list[Tensor], Slots]:
    """Run the forward part; returns the outputs, the new values of mutated buffers, and the slots left for backward."""
    slots: Slots = dict(zip(executable.inputs, arguments, strict=True)) | executable.constants
    execute(executable.forward, slots, machine, lambda _slots, _instruction: None)
    outputs = [slots[o] if isinstance(o, Slot) else o for o in executable.outputs]
    mutated = [slots[m] for m in executable.mutations]
    left = {s: v for s, v in slots.items() if s not in executable.unused}
    return outputs, mutated, left | executable.constants


def run_backward(step: Step, tangents: dict[int, Tensor], machine: Machine) -> dict[str, Tensor]:
    """Run the backward part; returns the sum of the contributions to each primal's gradient.

    Without update nodes nothing outside is touched before all of it has run, so an exception leaves gradients as they
    were.
    """
    assert step.slots is not None
    slots = dict(step.slots)
    if not torch_internals.keeps_graph():
        step.let_go()  # from here on this frame alone holds the saved activations, and drops each with its last use
    slots.update(tangents)
    totals: dict[str, Tensor] = {}

    def collect(values: Slots, instruction: Instruction) -> None:
        for _, s in instruction.outputs:
            for primal in step.executable.gradients.get(s, ()):
                value = values[s]
                if primal in totals:
                    wide = torch.promote_types(value.dtype, torch.float32)
                    totals[primal] = totals[primal].to(wide) + value
                else:
                    totals[primal] = value
            if s in step.executable.gradients and s not in later:
                del values[s]

    later = {s for i in step.executable.backward for s in i.inputs}
    execute(step.executable.backward, slots, machine, collect)
    for s, primals in step.executable.gradients.items():
        produced = any(s == o for i in step.executable.backward for _, o in i.outputs)
        if not produced:
            totals.update(dict.fromkeys(primals, slots[s]))
    return totals

"""Run: execute a program inside autograd, keep what backward needs, and hand gradients to the active slices.

A program's graph becomes a flat list of instructions over numbered slots; a value is dropped as soon
as its last instruction has taken it, so the memory of a step is what the graph says it is. Forward and
backward are two parts of that list; the slots that are alive between them belong to one `Step`, which
is everything that a pending backward owns.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from chunkft_fx import ops
from chunkft_fx.capture import keeps_graph
from chunkft_fx.errors import StaleBackward
from chunkft_fx.lowering import lower
from chunkft_fx.ops import STREAM_NODES
from chunkft_fx.program import Program, RegionCall
from chunkft_fx.saved_copies import SavedCopies
from chunkft_fx.slices import ActiveSlice
from chunkft_fx.specialize import Variant
from chunkft_fx.streams import Ring

Slots = dict[int, Any]


@dataclass(frozen=True)
class StreamNode:
    """A stream node; ``number`` is a buffer of the ring, or for saved values tells their copies apart."""

    target: Any
    number: int
    is_backward: bool
    is_saved: bool = False


@dataclass(frozen=True)
class Instruction:
    """One region call or stream node: slots in, slots out, and the input slots that die with it."""

    call: RegionCall | StreamNode
    inputs: tuple[int, ...]
    outputs: tuple[tuple[int, int], ...]
    last_use: tuple[int, ...]


@dataclass
class Executable:
    """A program compiled to instructions; ``gradients`` maps a slot to the gradients it is the value of."""

    program: Program
    forward: list[Instruction]
    backward: list[Instruction]
    constants: Slots
    inputs: tuple[int, ...]
    tangents: tuple[int, ...]
    outputs: tuple[Any, ...]
    mutations: tuple[int, ...]
    gradients: dict[int, list[str]]
    unused: frozenset[int] = field(default_factory=frozenset)


class Slot(int):
    """The number of a slot, to tell it from a plain constant among the outputs."""


def assemble(program: Program, num_inputs: int) -> Executable:
    """Turn a program's graph into instructions with exact lifetimes."""
    slots: dict[fx.Node, int] = {}
    constants: Slots = {}

    def slot(value: Any) -> int:
        if isinstance(value, fx.Node):
            return slots.setdefault(value, Slot(len(slots) + len(constants)))
        number = Slot(len(slots) + len(constants))
        constants[number] = torch.tensor(value)  # the run-time start of a slice
        return number

    placeholders = [slot(n) for n in program.graph.find_nodes(op="placeholder")]
    results: Any = program.graph.output_node().args[0]
    outputs, mutations, gradients = results
    numbers: dict[fx.Node, int] = {}
    raw: list[tuple[RegionCall | StreamNode, tuple[int, ...], tuple[tuple[int, int], ...]]] = []
    for node in program.graph.nodes:
        if node.op != "call_module" and node.target not in STREAM_NODES:
            continue
        taken: list[Any] = [(u.args[1], slot(u)) for u in node.users if u.target is operator.getitem]
        arguments: Any = node.args if node.op == "call_module" else node.args[0]
        callee = _region_call(program, node) if node.op == "call_module" else _stream_node(node, numbers)
        raw.append((callee, tuple(slot(a) for a in arguments), tuple(taken)))
    keep = {slot(n) for n in (*outputs, *mutations, *gradients) if isinstance(n, fx.Node)}
    instructions: list[Instruction] = []
    alive: set[int] = set()
    for call, inputs, results in reversed(raw):
        dying = tuple(s for s in dict.fromkeys(inputs) if s not in alive and s not in keep and s not in constants)
        alive |= set(inputs)
        instructions.append(Instruction(call, inputs, results, dying))
    instructions.reverse()
    backward = [i for i in instructions if i.call.is_backward]
    by_slot: dict[int, list[str]] = {}
    for node, primal in zip(gradients, program.gradients, strict=True):
        by_slot.setdefault(slot(node), []).append(primal)
    needed = {s for i in backward for s in i.inputs} | set(by_slot)
    return Executable(
        program=program,
        forward=[i for i in instructions if not i.call.is_backward],
        backward=backward,
        constants=constants,
        inputs=tuple(placeholders[:num_inputs]),
        tangents=tuple(placeholders[num_inputs:]),
        outputs=tuple(Slot(slots[o]) if isinstance(o, fx.Node) else o for o in outputs),
        mutations=tuple(slots[m] for m in mutations),
        gradients=by_slot,
        unused=frozenset(range(len(slots) + len(constants))) - needed,
    )


def exchanged(executable: Executable, variants: Sequence[Variant]) -> Executable:
    """The same instructions with a variant of the same interface in each region's place; for predictions only."""

    def with_variant(instruction: Instruction) -> Instruction:
        call = instruction.call
        if not isinstance(call, RegionCall) or call.variant is variants[call.region.index]:
            return instruction
        return replace(instruction, call=RegionCall(call.region, variants[call.region.index], call.is_backward))

    return replace(
        executable,
        program=replace(executable.program, variants=tuple(variants)),
        forward=[with_variant(i) for i in executable.forward],
        backward=[with_variant(i) for i in executable.backward],
    )


def _region_call(program: Program, node: fx.Node) -> RegionCall:
    call = program.module.get_submodule(str(node.target))
    assert isinstance(call, RegionCall)
    return call


def _stream_node(node: fx.Node, numbers: dict[fx.Node, int]) -> StreamNode:
    """Describe a stream node; ``numbers`` collects the offloads and fetches of saved values, in order."""
    begins: fx.Node = node
    if node.target in (ops.wait, ops.release):
        value = node.all_input_nodes[0]
        begins = next((u for u in value.users if u.target is ops.offload), value.all_input_nodes[0])
    is_backward = node.meta["part"] == "backward"
    buffer: Any = begins.args[2] if begins.target is ops.fetch else ops.FRESH
    if buffer != ops.FRESH:
        return StreamNode(node.target, buffer, is_backward)
    return StreamNode(node.target, numbers.setdefault(begins, len(numbers)), is_backward, is_saved=True)


@dataclass(frozen=True)
class Machine:
    """What instructions run on: how regions are lowered, and what carries streamed weights and saved values."""

    backend: str
    fake_mode: Any
    ring: Ring | None = None
    saved: SavedCopies | None = None

    def run(self, instruction: Instruction, arguments: list[Any]) -> Sequence[Any]:
        """Run one instruction; a region call may empty its arguments."""
        call = instruction.call
        if isinstance(call, RegionCall):
            return lower(call.variant, self.backend, self.fake_mode, call.is_backward)(arguments)
        if call.is_saved:
            return self._carry(call, arguments)
        assert self.ring is not None
        if call.target is ops.fetch:
            return self.ring.fetch(arguments, call.number)
        if call.target is ops.wait:
            self.ring.wait(call.number)
        return ()

    def abandon(self) -> None:
        """Called when instructions failed halfway, before their values are dropped."""
        if self.saved is not None:
            self.saved.abandon()

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
    program takes, ``shapes`` describes the outputs; ``replay`` runs the forward again for others.
    """

    executable: Executable
    slots: Slots | None
    owner: tuple[ActiveSlice, ...]
    versions: list[tuple[Tensor, int]]
    replay: Callable[[frozenset[str]], Step]
    provided: frozenset[str]
    shapes: list[tuple[torch.Size, torch.dtype, torch.device] | None]

    def zeros(self, output: int) -> Tensor:
        """The gradient of an output that was expected to get one and did not."""
        described = self.shapes[output]
        assert described is not None
        shape, dtype, device = described
        return torch.zeros(shape, dtype=dtype, device=device)

    def check(self, owner: tuple[ActiveSlice, ...]) -> None:
        """Raise `StaleBackward` unless this step can still be run backward."""
        if self.slots is None:
            raise StaleBackward(
                "backward was called a second time for the same forward, whose saved activations are freed; "
                "call the model again, or pass retain_graph=True to the first backward"
            )
        if owner is not self.owner:
            raise StaleBackward(
                "the active chunk changed between this forward and its backward; "
                "call backward before optimizer.step() or activate(), or call the model again"
            )
        for tensor, version in self.versions:
            if tensor._version != version:
                raise StaleBackward(
                    f"a tensor of shape {list(tensor.shape)} that backward needs was changed in place "
                    "since the forward; call backward before optimizer.step(), or call the model again"
                )


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

    Nothing outside is touched before all of it has run, so an exception leaves gradients as they were.
    """
    assert step.slots is not None
    slots = dict(step.slots)
    if not keeps_graph():
        # from here on this frame alone holds the saved activations, and drops each with its last use
        step.slots = None
        step.versions.clear()
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

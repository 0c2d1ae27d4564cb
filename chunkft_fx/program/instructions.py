"""Writes a program's graph as a flat list of instructions over numbered slots: an executable.

A value is dropped as soon as its last instruction has taken it, so the memory of a step is what the graph says it is.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from chunkft_fx.graph import ops
from chunkft_fx.graph.ops import STREAM_NODES
from chunkft_fx.program.program import Program, RegionCall, region_call
from chunkft_fx.program.variants import Variant

Slots = dict[int, Any]


@dataclass(frozen=True)
class StreamNode:
    """A stream node; ``number`` is a buffer of the ring, or for saved values tells their copies apart.

    ``share`` is that of ``admit``, whose ``number`` means nothing; that of ``add_up`` is 1 where the total is a sum
    already, which nothing else holds, so that it is added to in place. Nodes of pieces have the piece for a number; for
    an update, or a ``keep``, ``names`` has the parameter of each gradient that it takes, and ``group`` tells the
    backward call that it stands behind; for a ``reduce``, ``names`` has its one parameter.
    """

    target: Any
    number: int
    is_backward: bool
    is_saved: bool = False
    share: float = 0.0
    names: tuple[str, ...] = ()
    group: int = 0


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

    @property
    def has_updates(self) -> bool:
        """Whether its backward updates weights."""
        return self._has(ops.update)

    @property
    def keeps_gradients(self) -> bool:
        """Whether its backward sends gradients to host memory."""
        return self._has(ops.keep)

    def _has(self, target: Any) -> bool:
        return any(isinstance(i.call, StreamNode) and i.call.target is target for i in self.backward)


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
        if node.target in ops.SUMS:
            taken = [(0, slot(node))]
        arguments: Any = node.args if node.op == "call_module" else node.args[0]
        if node.target in (ops.admit, ops.fetch_states, ops.write_states):
            arguments = ()
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
        return replace(instruction, call=region_call(call.region, variants[call.region.index], call.is_backward))

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
    if node.target is ops.admit:
        share: Any = node.args[0]
        return StreamNode(node.target, 0, node.meta["part"] == "backward", share=share)
    if node.target is ops.add_up:
        contributions: Any = node.args[0]
        return StreamNode(node.target, int(contributions[0].target is ops.add_up), is_backward=True)
    if node.target is ops.reduce:
        return StreamNode(node.target, 0, is_backward=True, names=(node.meta["gradient_of"],))
    if node.target in ops.PIECE_NODES:
        piece: Any = node.args[-1]
        names, group = node.meta.get("names", ()), node.meta.get("group", 0)
        return StreamNode(node.target, piece, node.meta["part"] == "backward", names=names, group=group)
    begins: fx.Node = node
    if node.target in (ops.wait, ops.release):
        value = node.all_input_nodes[0]
        begins = next((u for u in value.users if u.target is ops.offload), value.all_input_nodes[0])
    is_backward = node.meta["part"] == "backward"
    buffer: Any = begins.args[2] if begins.target is ops.fetch else ops.FRESH
    if buffer != ops.FRESH:
        return StreamNode(node.target, buffer, is_backward)
    return StreamNode(node.target, numbers.setdefault(begins, len(numbers)), is_backward, is_saved=True)

"""Predicts the memory of a whole step: what is alive, from the first region's forward to the last gradient.

A step's instructions are replayed over storages instead of tensors: each region call adds the peak that the memory
model found for its graph, and every value dies where the run time drops it. Counted is what a step adds to what is
there anyway: weights, buffers, the ring, the batch, optimizer states, and gradients held from earlier backwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from chunkft_fx.capture.outline import Region
from chunkft_fx.graph import ops
from chunkft_fx.graph.sizes import AS_TRACED, Sizes
from chunkft_fx.graph.storages import Key, Storages
from chunkft_fx.predict.region.memory import graph_of, workspace
from chunkft_fx.program.instructions import Executable, Instruction, Slot, StreamNode
from chunkft_fx.program.program import RegionCall
from chunkft_fx.program.variants import Variant

# The parts of a moment by name, in bytes.
Terms = dict[str, int]

SAVED, OUTPUTS, GRADIENTS, COPIES, WORKSPACE = (
    "saved activations", "outputs and their gradients", "new gradients", "copies of written buffers", "workspace"
)  # fmt: skip


@dataclass(frozen=True)
class Moment:
    """One point of a step: what runs, and the bytes alive at its peak, by name."""

    label: str
    terms: Terms

    @property
    def nbytes(self) -> int:
        """Bytes alive, of all terms."""
        return sum(self.terms.values())


def step_timeline(
    executable: Executable, backend: str = "eager", is_first: bool = False, sizes: Sizes = AS_TRACED
) -> tuple[Moment, ...]:
    """The moments of a step in order: every region call, and each sum that a gradient goes into.

    Terms: ``"saved activations"`` are values alive between region calls, ``"outputs and their gradients"`` what the
    caller is assumed to hold until backward ends, ``"new gradients"`` what this backward has made so far,
    ``"copies of written buffers"`` the old values that backward reads, ``"workspace"`` what runs allocates itself.
    ``is_first`` says that no gradients are held from an earlier backward: then this one makes the tensors that hold
    them; else it adds to those, which are not counted. ``sizes`` are the batch's, by default those that were traced.
    The optimizer's step is not a part of this.
    """
    replay = _Replay(executable, backend, sizes)
    for instruction in executable.forward:
        replay.run(instruction)
    replay.end_forward()
    for instruction in executable.backward:
        replay.run(instruction)
    replay.end_backward()
    if is_first:
        replay.make_sums()
    return tuple(replay.moments)


def most_workspace(moments: Iterable[Moment]) -> int:
    """The most bytes that a region call allocates itself."""
    return max((m.terms[WORKSPACE] for m in moments), default=0)


def moment_label(region: Region, is_backward: bool) -> str:
    """The label of the moments at which a region runs."""
    return f"{region.label} {'backward' if is_backward else 'forward'}"


def storages_nbytes(tensors: Iterable[Any], besides: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages under real tensors, each once, without those under ``besides``: a batch beside a model."""
    known = {t.untyped_storage().data_ptr() for t in besides}
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(nbytes for key, nbytes in found.items() if key not in known)


@dataclass(frozen=True)
class _Value:
    """An input or output of a region call: its storage within the call, whose bytes it is, and its own shape."""

    key: Key | None
    nbytes: int
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class _Ends:
    """The inputs and outputs of one direction of a variant."""

    inputs: tuple[_Value, ...]
    outputs: tuple[_Value, ...]


_ENDS: WeakKeyDictionary[Variant, dict[tuple[bool, Sizes], _Ends]] = WeakKeyDictionary()


def _ends(variant: Variant, is_backward: bool, sizes: Sizes) -> _Ends:
    """Read off a variant's graph once."""
    known = _ENDS.setdefault(variant, {})
    key = is_backward, sizes
    if key not in known:
        graph = graph_of(variant, is_backward)
        held = Storages(graph, sizes)
        values: Any = graph.output_node().args[0]
        inputs = tuple(_value(node, held) for node in graph.find_nodes(op="placeholder"))
        known[key] = _Ends(inputs, tuple(_value(node, held) for node in values))
    return known[key]


def outputs_nbytes(variant: Variant, is_backward: bool, sizes: Sizes) -> tuple[int, ...]:
    """Bytes of the storages of what one direction of a variant returns, in order."""
    return tuple(value.nbytes for value in _ends(variant, is_backward, sizes).outputs)


def _value(node: Any, held: Storages) -> _Value:
    value = node.meta["val"] if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        return _Value(None, 0, torch.int64, 0)
    (key,) = held.of(node)
    return _Value(key, held.nbytes[key], value.dtype, held.sizes.of(value.numel()))


@dataclass(eq=False)
class _Storage:
    """Bytes that are alive while ``holders`` is above 0, and the term that they count under."""

    nbytes: int
    term: str
    holders: int = 0


@dataclass
class _Sum:
    """The contributions to one gradient so far."""

    storage: _Storage
    dtype: torch.dtype
    numel: int


@dataclass
class _Replay:
    """The storages alive between region calls and who holds them."""

    executable: Executable
    backend: str
    sizes: Sizes
    moments: list[Moment] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.alive: Terms = dict.fromkeys((SAVED, OUTPUTS, GRADIENTS, COPIES), 0)
        # slots that are missing here hold weights, inputs or constants, which are alive all the time
        self.storage_of: dict[int, _Storage] = {}
        # by slot of a region call's result or of its host copy, the bytes of a copy of it
        self.copy_nbytes: dict[int, int] = {}
        # by slot of a region call's result or of a sum of gradients, what it looks like
        self.value_of: dict[int, _Value] = {}
        self.sums: dict[str, _Sum] = {}
        self.mutations = set(self.executable.mutations)
        self.outputs = {o for o in self.executable.outputs if isinstance(o, Slot)}
        self.tangents = set(self.executable.tangents)
        self.later = {s for i in self.executable.backward for s in i.inputs}
        self.alive[COPIES] = sum(v.nbytes for s, v in self._made() if s in self.mutations)
        self.label = ""
        self.updating: list[int] = []  # slots of gradients whose updates may not be done
        self.group: int | None = None

    def _made(self) -> Iterator[tuple[int, _Value]]:
        for instruction in self.executable.forward:
            if isinstance(instruction.call, RegionCall):
                outputs = _ends(instruction.call.variant, False, self.sizes).outputs
                yield from ((slot, outputs[index]) for index, slot in instruction.outputs)

    def run(self, instruction: Instruction) -> None:
        call = instruction.call
        if not isinstance(call, RegionCall):
            self._carry(instruction, call)
            return
        self.label = moment_label(call.region, call.is_backward)
        ends = _ends(call.variant, call.is_backward, self.sizes)
        known: dict[Key | None, _Storage | None] = {None: None}
        for slot, value in zip(instruction.inputs, ends.inputs, strict=True):
            known[value.key] = self.storage_of.get(slot)
        dying = self._dying(instruction)
        self._see(workspace(call.variant, call.is_backward, self.backend, dying, self.sizes))
        for index, slot in instruction.outputs:
            value = ends.outputs[index]
            if value.key not in known:
                known[value.key] = _Storage(value.nbytes, SAVED)
            storage = known[value.key]
            if storage is not None:
                self.storage_of[slot] = self._hold(storage, OUTPUTS if slot in self.outputs else SAVED)
            self.copy_nbytes[slot] = value.numel * value.dtype.itemsize
            self.value_of[slot] = value
        for slot in instruction.last_use:
            self._drop(slot)
        self._collect(instruction)

    def _collect(self, instruction: Instruction) -> None:
        """Take the gradients among an instruction's results."""
        for _, slot in instruction.outputs:
            for primal in self.executable.gradients.get(slot, ()):
                self._add(primal, slot, self.value_of[slot])
            if slot in self.executable.gradients and slot not in self.later:
                self._drop(slot)

    def _add_up(self, instruction: Instruction, node: StreamNode) -> None:
        """A micro-batch's gradient goes into the sum of those before it, which is made, or added to in place."""
        (_, total), (before, _) = instruction.outputs[0], instruction.inputs
        value = self.value_of[before]
        wide = torch.promote_types(value.dtype, torch.float32)
        storage = self.storage_of[before] if node.number else _Storage(value.numel * wide.itemsize, SAVED)
        self.storage_of[total] = self._hold(storage, SAVED)
        self.value_of[total] = replace(value, dtype=wide)
        self._see(0)
        for slot in instruction.last_use:
            self._drop(slot)
        self._collect(instruction)

    def _reduce(self, instruction: Instruction) -> None:
        """The contributions to a gradient go into a sum of the wide dtype, which becomes its mean over ranks."""
        _, total = instruction.outputs[0]
        value = self.value_of[instruction.inputs[0]]
        wide = torch.promote_types(value.dtype, torch.float32)
        storage = _Storage(value.numel * wide.itemsize, SAVED)
        self.storage_of[total] = self._hold(storage, SAVED)
        self.value_of[total] = replace(value, dtype=wide)
        self._see(storage.nbytes if len(instruction.inputs) > 1 else 0)
        for slot in instruction.last_use:
            self._drop(slot)
        self._collect(instruction)

    def _carry(self, instruction: Instruction, node: StreamNode) -> None:
        """A stream node: weights pass through the ring, which is there anyway; saved values come and go."""
        if node.target is ops.reduce:
            self._reduce(instruction)
            return
        if node.target is ops.add_up:
            self._add_up(instruction, node)
            return
        for index, slot in instruction.outputs if node.is_saved else ():
            nbytes = self.copy_nbytes[slot] = self.copy_nbytes[instruction.inputs[index]]
            if node.target is ops.fetch:
                self.storage_of[slot] = self._hold(_Storage(nbytes, SAVED), SAVED)
        if node.target in ops.TAKERS and node.group != self.group:
            self._let_go(node.group)
        for slot in instruction.last_use:
            if node.target in ops.TAKERS:  # runs beside the backward call that follows
                self.updating.append(slot)
            else:
                self._drop(slot)

    def _let_go(self, group: int | None) -> None:
        """The updates so far are done, and their gradients gone."""
        for slot in self.updating:
            self._drop(slot)
        self.updating, self.group = [], group

    def end_forward(self) -> None:
        """Let go of what backward does not need and the caller did not get; the caller's gradients come in."""
        for slot in self.executable.unused - self.outputs:
            self._drop(slot)
        came: dict[int, int] = {}
        for instruction in self.executable.backward:
            if isinstance(instruction.call, RegionCall):
                inputs = _ends(instruction.call.variant, True, self.sizes).inputs
                came |= {s: v.nbytes for s, v in zip(instruction.inputs, inputs, strict=True) if s in self.tangents}
        self.alive[OUTPUTS] += sum(came.values())  # autograd holds them until backward returns

    def end_backward(self) -> None:
        """Only outputs and the new gradients are left."""
        for slot in list(self.storage_of.keys() - self.outputs):
            self._drop(slot)

    def make_sums(self) -> None:
        """Each parameter's gradient is copied into the tensor that later backwards add to, and then let go.

        One that is wider than its parameter becomes that tensor itself (`slices.ActiveSlice.handed`).
        """
        graph = self.executable.program.graph
        others = {n.target for n in graph.find_nodes(op="placeholder") if n.meta.get("parameter") is None}
        dtypes = self._dtypes()
        for primal, found in self.sums.items():
            wide = torch.promote_types(found.dtype, torch.float32)
            if primal not in others and not found.dtype == wide != dtypes[primal]:
                self.label = f"gradient of {primal}"
                self.alive[GRADIENTS] += found.numel * wide.itemsize
                self._see(0)
                self._release(found.storage)

    def _dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes of what regions with a backward read, by name."""
        regions = [i.call.region for i in self.executable.backward if isinstance(i.call, RegionCall)]
        values = [
            (p, n.meta["val"])
            for r in regions
            for p, n in zip(r.primals, r.template.graph.placeholders("primal"), strict=True)
        ]
        return {primal: value.dtype for primal, value in values if isinstance(value, Tensor)}

    def _dying(self, instruction: Instruction) -> frozenset[int]:
        """The positions of inputs whose storage nobody else holds during the call."""
        going: dict[_Storage, int] = {}
        for slot in instruction.last_use:
            storage = self.storage_of.get(slot)
            if storage is not None:
                going[storage] = going.get(storage, 0) + 1
        alone = {storage for storage, count in going.items() if storage.holders == count}
        return frozenset(i for i, s in enumerate(instruction.inputs) if self.storage_of.get(s) in alone)

    def _add(self, primal: str, slot: int, value: _Value) -> None:
        """Add up the contributions to a gradient, in a wider dtype, as the run time does."""
        storage = self.storage_of.get(slot)
        if storage is None:
            return
        before = self.sums.get(primal)
        if before is None:
            self.sums[primal] = _Sum(self._hold(storage, GRADIENTS), value.dtype, value.numel)
            return
        wide = torch.promote_types(value.dtype, torch.float32)
        nbytes = value.numel * wide.itemsize
        self._see(nbytes * (1 if before.dtype == wide else 2))
        self._release(before.storage)
        self.sums[primal] = _Sum(self._hold(_Storage(nbytes, GRADIENTS), GRADIENTS), wide, value.numel)

    def _hold(self, storage: _Storage, term: str) -> _Storage:
        """One more holder; a gradient or an output counts as that, whatever else it is."""
        if storage.holders:
            self.alive[storage.term] -= storage.nbytes
        storage.term = term if storage.term == SAVED else storage.term
        self.alive[storage.term] += storage.nbytes
        storage.holders += 1
        return storage

    def _drop(self, slot: int) -> None:
        storage = self.storage_of.pop(slot, None)
        if storage is not None:
            self._release(storage)

    def _release(self, storage: _Storage) -> None:
        storage.holders -= 1
        if not storage.holders:
            self.alive[storage.term] -= storage.nbytes

    def _see(self, inside: int) -> None:
        self.moments.append(Moment(self.label, self.alive | {WORKSPACE: inside}))

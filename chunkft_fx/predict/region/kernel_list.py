"""Predicts the kernels that a region graph becomes when it is compiled.

A compiler fuses elementwise chains, so a value is *stored* only if something outside its kernel needs it: it is an
output of the graph, an operand of a kernel that is not generated (matrix products, attention, convolutions, custom
operators), or the result of a reduction. `kernels` says which values these are and which kernels read and write them,
by the rules of torch's Inductor. The memory model and the cost model stand on this list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from chunkft_fx.graph.sizes import Sizes
from chunkft_fx.graph.storages import Key, Storages

aten = torch.ops.aten


def packets(*names: str) -> frozenset[Any]:
    """The ATen operators of these names, those that this torch has."""
    return frozenset(getattr(aten, n) for n in names if hasattr(aten, n))


# Fused like everything tagged as pointwise: each element of the result is computed by itself.
_GATHERS = packets("embedding", "gather", "index", "_unsafe_index", "_unsafe_masked_index", "index_select")
_FUSIBLE = _GATHERS | packets(
    "cat", "full", "full_like", "zeros", "zeros_like", "ones", "ones_like", "new_zeros", "new_full", "new_ones",
    "empty", "empty_like", "eye", "scalar_tensor", "arange", "constant_pad_nd", "slice_scatter", "select_scatter",
    "copy", "diagonal_scatter", "lift_fresh_copy", "flip", "repeat", "tril", "triu", "_to_copy", "_adaptive_avg_pool2d",
) | {torch.ops.prims.iota, torch.ops.prims.convert_element_type}  # fmt: skip
# Generated and fused with what they read, but no reader is fused with them: any element may land anywhere.
_SCATTERS = packets(
    "scatter", "scatter_add", "scatter_reduce", "index_put", "index_add", "_unsafe_index_put",
    "_unsafe_masked_index_put_accumulate",
)  # fmt: skip
# Generated, and always stored for readers in other kernels: reductions, scans and scatters.
_STORED = _SCATTERS | packets(
    "sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all", "prod", "var", "var_mean", "std",
    "cumsum", "cumprod", "logcumsumexp", "logsumexp",
)  # fmt: skip
# Inductor computes a value once for all its readers, instead of again in each, if it has several and reads more
# than this many tensors (realize_reads_threshold), or on the CPU if it holds one of these operators.
_MOST_READS = 4
_HEAVY_ON_CPU = packets("exp", "log", "log1p", "sigmoid", "tanh")


@dataclass(frozen=True, eq=False)
class Store:
    """A node whose value is stored: the storages it makes with their bytes, and those it is computed from.

    ``reads`` gives the bytes read of each storage: less than all of it for a slice or a gather.
    """

    node: fx.Node
    reads: Mapping[Key, int]
    writes: Mapping[Key, int]


@dataclass(frozen=True, eq=False)
class Kernel:
    """What is launched at once: several stores if ``generated`` by the compiler, else one node.

    A storage in ``passed`` goes from one store to another in registers: it is never written.
    """

    stores: tuple[Store, ...]
    generated: bool
    passed: frozenset[Key] = frozenset()

    @property
    def is_scatter(self) -> bool:
        """Whether it changes its result in place, element by element."""
        return packet_of(self.stores[-1].node) in _SCATTERS

    @property
    def writes(self) -> dict[Key, int]:
        """Each storage written, with its bytes."""
        return {k: n for k, n in _merged(s.writes for s in self.stores).items() if k not in self.passed}

    @property
    def reads(self) -> dict[Key, int]:
        """The bytes read of each storage that the kernel does not make itself."""
        own = _merged(s.writes for s in self.stores)
        return {k: n for k, n in _merged(s.reads for s in self.stores).items() if k not in own}


def kernels(held: Storages, fused: bool = True) -> list[Kernel]:
    """The kernels of a graph in an order they can run in; with ``fused=False`` each node that makes a value is one."""
    found: list[Kernel] = []
    sources: dict[fx.Node, Mapping[Key, int]] = {}
    heavy: set[fx.Node] = set()
    for node in held.keys:
        if node.op == "placeholder":
            sources[node] = held.fresh(node)
            continue
        fresh = held.fresh(node)
        read = _merged(_read(node, s, sources[s], held.sizes) for s in node.all_input_nodes)
        generated = fused and _is_generated(node)
        if _is_heavy(node) or any(s in heavy for s in node.all_input_nodes):
            heavy.add(node)
        if not fresh:  # a view, or an element of several results
            seen = held.sizes.nbytes(node.meta.get("val"))
            own = held.of(node)
            mine = {k: n for k, n in read.items() if k in own} or read
            sources[node] = {k: min(n, seen) for k, n in mine.items()}
        elif generated and not _is_stored(node, held, len(read), node in heavy):
            sources[node] = read
        else:
            sources[node] = fresh
            heavy.discard(node)
            _launch(found, Store(node, read, fresh), generated, held.sizes)
    results = {k for node in held.keys for k in held.of(node) if any(u.op == "output" for u in node.users)}
    needed = results.union(*(k.reads for k in found))
    return _in_order([replace(k, passed=frozenset(k.writes.keys() - needed)) if k.generated else k for k in found])


def packet_of(node: fx.Node) -> Any:
    """What a node calls: an operator's packet (all its overloads), else the target itself."""
    return getattr(node.target, "overloadpacket", node.target)


def _is_generated(node: fx.Node) -> bool:
    packet = packet_of(node)
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or packet in _FUSIBLE or packet in _STORED


def _is_heavy(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return packet_of(node) in _HEAVY_ON_CPU and isinstance(value, Tensor) and value.device.type == "cpu"


def _is_stored(node: fx.Node, held: Storages, num_reads: int, is_heavy: bool) -> bool:
    if packet_of(node) in _STORED:
        return True
    readers = list(_readers(node, held))
    if any(r.op == "output" or not _is_generated(r) for r in readers):
        return True
    return len(readers) > 1 and (is_heavy or num_reads > _MOST_READS)


def _readers(node: fx.Node, held: Storages) -> Iterator[fx.Node]:
    """What reads a node's value, also through views of it."""
    for user in node.users:
        is_view = user.op == "call_function" and not held.fresh(user)
        yield from _readers(user, held) if is_view else (user,)


def _read(node: fx.Node, source: fx.Node, held: Mapping[Key, int], sizes: Sizes) -> Mapping[Key, int]:
    if packet_of(node) not in _GATHERS or source is not node.args[0]:
        return held
    most = sizes.nbytes(node.meta["val"])
    return {k: min(n, most) for k, n in held.items()}


def _merged(maps: Iterable[Mapping[Key, int]]) -> dict[Key, int]:
    merged: dict[Key, int] = {}
    for each in maps:
        for key, nbytes in each.items():
            merged[key] = max(merged.get(key, 0), nbytes)
    return merged


def _launch(found: list[Kernel], store: Store, generated: bool, sizes: Sizes) -> None:
    """Add a store to the kernel that it shares most bytes with, or as a kernel of its own."""
    if generated and packet_of(store.node) not in _SCATTERS:
        shared = [(_shared(k, store, sizes), -i) for i, k in enumerate(found) if k.generated and not k.is_scatter]
        for nbytes, i in sorted(shared, reverse=True):
            if nbytes and not _passes(found, store, found[-i]):
                found[-i] = Kernel((*found[-i].stores, store), True)
                return
    found.append(Kernel((store,), generated))


def _shared(kernel: Kernel, store: Store, sizes: Sizes) -> int:
    """Bytes that need not be read again when a store joins a kernel: what it computes, and what equal loops read."""
    through = sum(n for k, n in kernel.writes.items() if k in store.reads)
    alike = any(_work(s, sizes) == _work(store, sizes) for s in kernel.stores)
    return through + sum(n for k, n in kernel.reads.items() if alike and k in store.reads)


def _work(store: Store, sizes: Sizes) -> int:
    """Elements that a store's loop runs over: of its result, or of what it reduces."""
    values = (v.meta.get("val") for v in (store.node, *store.node.all_input_nodes))
    return max(sizes.of(v.numel()) for v in values if isinstance(v, Tensor))


def _passes(found: list[Kernel], store: Store, kernel: Kernel) -> bool:
    """Whether a store needs a kernel's results by way of another kernel, which must then run in between."""
    makers = {key: k for k in found for key in k.writes}
    pending = [makers[key] for key in store.reads if key in makers and makers[key] is not kernel]
    seen: set[Kernel] = set()
    while pending:
        current = pending.pop()
        if current is kernel:
            return True
        if current not in seen:
            seen.add(current)
            pending += [makers[key] for key in current.reads if key in makers]
    return False


def _in_order(found: list[Kernel]) -> list[Kernel]:
    """Each kernel after those it reads from, otherwise as they stand."""
    makers = {key: k for k in found for key in k.writes}
    done: dict[Kernel, None] = {}

    def visit(kernel: Kernel) -> None:
        if kernel in done:
            return
        for key in kernel.reads:
            if key in makers:
                visit(makers[key])
        done[kernel] = None

    for kernel in found:
        visit(kernel)
    return list(done)

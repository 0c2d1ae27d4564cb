"""Predicts the bytes that a region needs while it runs.

The model is liveness, storage by storage (views count once), over the kernels that a partitioned graph becomes
(`predict.region.kernel_list`). With ``backend="eager"`` every value is stored and the caller's inputs stay alive until
the call returns. Compiled graphs store less, free an input that nobody else holds after its last use, and write a
result over an operand that dies with it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from chunkft_fx.graph.sizes import AS_TRACED, Sizes
from chunkft_fx.graph.storages import Key, Storages
from chunkft_fx.graph.sub_graphs import Closed
from chunkft_fx.head.memory import head_workspace
from chunkft_fx.kernels import weight_gradient
from chunkft_fx.predict.region.kernel_list import Kernel, Store, kernels
from chunkft_fx.program.variants import Variant
from chunkft_fx.torch_internals import tree_leaves

_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward.default

# By variant: the peak of each question asked: the direction, whether it runs compiled, dying inputs, and sizes.
_PEAKS: WeakKeyDictionary[Variant, dict[tuple[bool, bool, frozenset[int], Sizes], int]] = WeakKeyDictionary()


def allocated_peak(graph: fx.Graph, fused: bool = False, dying: Iterable[int] = (), sizes: Sizes = AS_TRACED) -> int:
    """The most bytes that running a graph adds to what was alive before, its results included; never below 0.

    ``fused`` says that it runs compiled. ``dying`` are the positions of inputs that the callee alone holds, which it
    frees after their last use; all other inputs belong to the caller.
    """
    held = Storages(graph, sizes)
    inputs = graph.find_nodes(op="placeholder")
    given = {key for node in inputs for key in held.of(node)}
    chosen = set(dying)
    kept = {key for i, node in enumerate(inputs) if i not in chosen for key in held.of(node)}
    kept |= {key for node in graph.output_node().all_input_nodes for key in held.of(node)}
    nbytes = held.nbytes
    launched = kernels(held, fused)
    fixed = given.union(*(kernel.writes for kernel in launched if kernel.is_scatter))  # never written over
    last = {key: i for i, kernel in enumerate(launched) for key in (*kernel.writes, *kernel.reads)}
    total = peak = leaving = 0
    for i, kernel in enumerate(launched):
        if not (fused and _is_on_cpu(kernel)):
            total, leaving = total - leaving, 0
        dead = {key for key in (*kernel.writes, *kernel.reads) if last[key] == i and key not in kept}
        new = sum(kernel.writes.values())
        over = _overwritten(kernel, {key: nbytes[key] for key in dead - fixed}) if fused else 0
        changed = over + (new if kernel.is_scatter else 0)
        peak = max(peak, total + new - over + _inside(kernel, changed, sizes))
        total += new - over
        leaving += sum(nbytes[key] for key in dead) - over
    return peak


def _is_on_cpu(kernel: Kernel) -> bool:
    """Whether a kernel goes into one C++ function with those beside it, which frees nothing until it is left."""
    value = kernel.stores[-1].node.meta["val"]
    return kernel.generated and isinstance(value, Tensor) and value.device.type == "cpu"


def _overwritten(kernel: Kernel, dead: Mapping[Key, int]) -> int:
    """Bytes of results that are written over operands of the same size that die with this kernel.

    Inductor does so when whatever else in the kernel reads the operand comes before the result; on the CPU, where a
    reduction and its readers are loops side by side, only when nothing else reads it.
    """
    if not kernel.generated:
        return 0
    free = dict(dead)
    total = 0
    before: dict[Store, set[Store]] = {}
    for store in kernel.stores:
        direct = [s for s in before if s.writes.keys() & store.reads.keys()]
        before[store] = set() if _is_on_cpu(kernel) else set(direct).union(*(before[s] for s in direct))
        for nbytes in (n for k, n in store.writes.items() if k not in kernel.passed):
            fits = (k for k in store.reads if free.get(k) == nbytes and _is_last(kernel, k, store, before[store]))
            operand = next(fits, None)
            if operand is not None:
                del free[operand]
                total += nbytes
    return total


def _is_last(kernel: Kernel, key: Key, store: Store, before: set[Store]) -> bool:
    return all(s is store or s in before or key not in s.reads for s in kernel.stores)


def _inside(kernel: Kernel, changed: int, sizes: Sizes) -> int:
    """Bytes that a kernel has allocated beyond its results: by an operator for itself, or for timing it.

    ``changed`` are the bytes that it changes in place. Inductor times a kernel on copies of those, so that every run
    finds what the first did (``CachingAutotuner.maybe_clone_args`` in torch/_inductor/runtime/triton_heuristics.py).
    """
    if kernel.generated:
        value = kernel.stores[-1].node.meta["val"]
        flushed = timing_nbytes(value.device) if isinstance(value, Tensor) else 0
        return flushed + changed if flushed else 0
    node = kernel.stores[0].node
    if node.target is _FLASH_BACKWARD:
        return _flash_workspace(node, sizes)
    if isinstance(node.target, Closed):
        return _closed_workspace(node, node.target, sizes)
    return head_workspace(node, sizes) + weight_gradient.workspace(node, sizes)


@functools.cache
def timing_nbytes(device: torch.device) -> int:
    """What Inductor holds on a GPU while it times the ways to run a generated kernel, at the kernel's first call.

    Between two runs it overwrites a buffer as large as the L2 cache (60 MiB on an H200).
    Source: ``InductorBenchmarker.benchmark_gpu`` in torch/_inductor/runtime/benchmarking.py.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    return torch.cuda.get_device_properties(device).L2_cache_size


def _flash_workspace(node: fx.Node, sizes: Sizes) -> int:
    """Of flash attention's backward on CUDA: float32 sums of the query's gradient, and grouped heads spread out.

    Source: ``mha_bwd`` in torch's aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp.
    """
    args: Any = fx.map_arg(node.args, lambda n: n.meta["val"])
    query, key = args[1], args[2]
    batch, heads, length, width = sizes.shape(query)
    rows = batch * heads * _round_up(length, 128)
    sums = rows * 4 * (_round_up(width, 32 if width <= 128 else 64) + 1)
    spread = 2 * batch * heads * sizes.of(key.shape[2]) * width * key.element_size()
    return sums + (spread if sizes.of(key.shape[1]) != heads else 0)


def _closed_workspace(node: fx.Node, operator: Closed, sizes: Sizes) -> int:
    """Of an operator that runs graphs: the most that one of them allocates, and a second copy of what comes of it.

    Loops hold the values of one round while they make those of the next, or rows before they are stacked.
    """
    peaks = [allocated_peak(graph.graph, sizes=sizes) for graph in operator.graphs.values()]
    return max(peaks) + sum(sizes.nbytes(value) for value in tree_leaves(node.meta["val"]))


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def workspace(
    variant: Variant,
    is_backward: bool,
    backend: str = "eager",
    dying: frozenset[int] = frozenset(),
    sizes: Sizes = AS_TRACED,
) -> int:
    """The most bytes that one direction of a variant adds while it runs, its results included.

    ``dying`` are positions of inputs that nobody but the call holds. Found once for each variant and question.
    """
    fused = backend != "eager"
    peaks = _PEAKS.setdefault(variant, {})
    question = (is_backward, fused, dying if fused else frozenset(), sizes)
    if question not in peaks:
        peaks[question] = allocated_peak(graph_of(variant, is_backward), fused, question[2], sizes)
    return peaks[question]


def graph_of(variant: Variant, is_backward: bool) -> fx.Graph:
    """The graph of one direction of a variant; it must have that direction."""
    module = variant.backward if is_backward else variant.forward
    assert module is not None
    return module.graph

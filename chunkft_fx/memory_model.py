"""Memory model: bytes that a region needs while it runs, and the predicted peak of a step.

The model is liveness over the partitioned graphs, storage by storage (views count once), in the order
the nodes stand. It does not see what a compiler fuses away, so it errs on the high side for compiled
graphs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from chunkft_fx.passes.rewrite import tensor_nbytes
from chunkft_fx.program import RegionCall
from chunkft_fx.runtime import Executable
from chunkft_fx.specialize import Variant


def storages(value: Any) -> dict[int, int]:
    """The storages under a (nested) fake value, each with its bytes."""
    found: dict[int, int] = {}
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            key = int(StorageWeakRef(leaf.untyped_storage()).cdata)
            found[key] = max(found.get(key, 0), tensor_nbytes(leaf))
    return found


def allocated_peak(graph: fx.Graph) -> int:
    """The most bytes alive at once that the graph itself allocates (its inputs belong to the caller)."""
    outside = {k for n in graph.find_nodes(op="placeholder") for k in storages(n.meta["val"])}
    last: dict[int, fx.Node] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            for key in storages(source.meta.get("val")):
                last[key] = node
    dying: dict[fx.Node, list[int]] = {}
    for key, node in last.items():
        dying.setdefault(node, []).append(key)
    alive: dict[int, int] = {}
    total = peak = 0
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        for key, nbytes in storages(node.meta.get("val")).items():
            if key not in outside and key not in alive:
                alive[key] = nbytes
                total += nbytes
        peak = max(peak, total)
        for key in dying.get(node, ()):
            total -= alive.pop(key, 0)
    return peak


def workspace(variant: Variant, is_backward: bool) -> int:
    """The most bytes that one direction of a variant allocates while it runs, its results included."""
    module = variant.backward if is_backward else variant.forward
    assert module is not None
    if is_backward not in variant.workspace:
        variant.workspace[is_backward] = allocated_peak(module.graph)
    return variant.workspace[is_backward]


def step_peak(executable: Executable) -> dict[str, int]:
    """Replay a step's instructions; returns the terms of its largest moment.

    ``"saved activations"`` are values alive between region calls (weights and batch excluded),
    ``"workspace"`` is what the region call at the peak allocates itself.
    """
    alive: dict[int, int] = {}
    best = {"saved activations": 0, "workspace": 0}
    total = 0
    for instruction in [*executable.forward, *executable.backward]:
        call = instruction.call
        if not isinstance(call, RegionCall):
            continue  # fetched weights lie in the ring, which is there for the whole step
        inside = workspace(call.variant, call.is_backward)
        if total + inside > sum(best.values()):
            best = {"saved activations": total, "workspace": inside}
        module = call.variant.backward if call.is_backward else call.variant.forward
        assert module is not None
        values: Any = module.graph.output_node().args[0]
        for index, slot in instruction.outputs:
            alive[slot] = tensor_nbytes(values[index].meta["val"])
            total += alive[slot]
        for slot in instruction.last_use:
            total -= alive.pop(slot, 0)
    return best

"""Predicts how long a region graph takes, kernel by kernel.

Times are those of a roofline: a kernel takes as long as its arithmetic or its memory traffic, whichever is slower,
and one launch. A plan is made before anything is compiled, so measured are the rates of the machine, not variants.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from chunkft_fx.graph.sizes import AS_TRACED, Sizes
from chunkft_fx.graph.storages import Storages
from chunkft_fx.head.memory import blocks, repeated_nbytes
from chunkft_fx.machine.rates import Rates
from chunkft_fx.predict.region.kernel_list import Kernel, kernels, packet_of, packets
from chunkft_fx.program.variants import Variant
from chunkft_fx.torch_internals import flop_formula, tree_map

aten = torch.ops.aten

# Attention operators, and where the query stands among their arguments (key and value follow).
_SDPA = [f"_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn")]
_QUERY = dict.fromkeys(packets(*_SDPA), 0) | dict.fromkeys(packets(*(f"{name}_backward" for name in _SDPA)), 1)
# Operators without a formula of their own that do the work of another.
_LIKE = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}


@dataclass(frozen=True)
class Work:
    """What one kernel does: multiply-adds count two ``flops``, in ``dtype``; ``nbytes`` are read or written.

    An operator that works block by block ``launches`` as often.
    """

    flops: int
    dtype: str
    nbytes: int
    launches: int = 1

    def us(self, rates: Rates) -> float:
        """Microseconds; a dtype that was not measured goes at the slowest rate."""
        by_dtype = rates.matmul_flops_per_s
        arithmetic = self.flops / by_dtype.get(self.dtype, min(by_dtype.values()))
        return max(arithmetic, self.nbytes / rates.memory_nbytes_per_s) * 1e6 + self.launches * rates.launch_us


@dataclass(frozen=True)
class Cost:
    """What a graph does, kernel by kernel."""

    kernels: tuple[Work, ...]

    @property
    def flops(self) -> dict[str, int]:
        """Floating-point operations of matrix products, attention and convolutions, by dtype name."""
        found: dict[str, int] = {}
        for k in self.kernels:
            if k.flops:
                found[k.dtype] = found.get(k.dtype, 0) + k.flops
        return found

    @property
    def nbytes(self) -> int:
        """Bytes read and written in device memory."""
        return sum(k.nbytes for k in self.kernels)

    @property
    def launches(self) -> int:
        """How many kernels are started."""
        return sum(k.launches for k in self.kernels)

    def us(self, rates: Rates) -> float:
        """Microseconds on a machine of these rates."""
        return sum(k.us(rates) for k in self.kernels)


def graph_cost(graph: fx.Graph, fused: bool = True, sizes: Sizes = AS_TRACED) -> Cost:
    """The cost of running a partitioned region graph once; ``fused=False`` for a graph that is run node by node.

    Operators without a formula in torch's registry cost their bytes only. Attention counts in full also where it is
    causal, as torch counts it.
    """
    return Cost(tuple(_work_of(k, sizes) for k in kernels(Storages(graph, sizes), fused)))


def _work_of(kernel: Kernel, sizes: Sizes) -> Work:
    node = kernel.stores[0].node
    nbytes = sum(kernel.reads.values()) + sum(kernel.writes.values()) + repeated_nbytes(node, sizes)
    values = [n.meta.get("val") for n in node.all_input_nodes]
    dtype = next((v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()), torch.float32)
    flops = 0 if kernel.generated else _flops(node, sizes)
    return Work(flops, str(dtype).removeprefix("torch."), nbytes, blocks(node, sizes))


def _flops(node: fx.Node, sizes: Sizes) -> int:
    packet = _LIKE.get(packet_of(node), packet_of(node))
    formula = flop_formula(packet)
    if formula is None:
        return 0
    args, options, value = tree_map(
        functools.partial(_sized, sizes), fx.map_arg((node.args, node.kwargs, node), lambda n: n.meta["val"])
    )
    if packet in _QUERY:
        # Grouped heads do the work of as many as the query has, which is all that some versions of the formulas take.
        first = _QUERY[packet]
        heads = args[first].shape[1]
        same = [a.new_empty((a.shape[0], heads, *a.shape[2:])) for a in args[first + 1 : first + 3]]
        args = (*args[: first + 1], *same, *args[first + 3 :])
    return int(formula(*args, **options, out_val=value))


def _sized(sizes: Sizes, value: Any) -> Any:
    """A value with plain sizes for the formulas: a tensor without data in place of a fake one."""
    if isinstance(value, Tensor):
        return torch.empty(sizes.shape(value), dtype=value.dtype, device="meta")
    return sizes.of(value) if isinstance(value, torch.SymInt) else value


# By variant, direction and sizes: equal regions share their variants.
_COSTS: WeakKeyDictionary[Variant, dict[tuple[bool, Sizes], Cost]] = WeakKeyDictionary()


def direction_us(variant: Variant, is_backward: bool, rates: Rates, sizes: Sizes = AS_TRACED) -> float:
    """Microseconds of one direction of a compiled variant; 0 for a backward that it does not have."""
    module = variant.backward if is_backward else variant.forward
    if module is None:
        return 0.0
    known = _COSTS.setdefault(variant, {})
    key = is_backward, sizes
    if key not in known:
        known[key] = graph_cost(module.graph, sizes=sizes)
    return known[key].us(rates)


def transfer_us(
    nbytes: int, rates: Rates, direction: Literal["host_to_device", "device_to_host", "both_ways"]
) -> float:
    """Microseconds to move bytes between host and device; ``"both_ways"`` moves as many the other way meanwhile."""
    by_direction = {
        "host_to_device": rates.host_to_device_nbytes_per_s,
        "device_to_host": rates.device_to_host_nbytes_per_s,
        "both_ways": rates.both_ways_nbytes_per_s,
    }
    return nbytes / by_direction[direction] * 1e6

"""select_slices: replace each backward output by what is demanded of it.

Contract: the meaning of a chunk. An output nobody demands becomes ``None``; one demanded whole stays; of
any other the demanded slice is taken, from a start that is known only at run time and becomes a new
placeholder ``start_<output>`` (``i64[]``, on the CPU). Dense gradients are still computed: this pass is
right on its own, `sink_slices` makes it fast.

Terms: *demand* is one entry a backward output (see `region.OutputDemand`).

Before::

    return (out, dw_q, dw_k, dx)

After, with demand ``(SliceDemand(0, 64), None, "whole")``::

    narrow: "f32[64, 256]" = chunkft_fx.narrow(dw_q, 0, start_0, 64)
    return (out, narrow, None, dx)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from chunkft_fx.graph.ops import narrow
from chunkft_fx.graph.region import OutputDemand, RegionGraph
from chunkft_fx.graph.rewrite import insert_before
from chunkft_fx.torch_internals import fake_mode_of


@dataclass(frozen=True)
class SelectSlices:
    """Keep of each backward output only what ``demand`` asks for."""

    demand: tuple[OutputDemand, ...]
    name: str = "select_slices"
    numerics: Literal["bitwise", "reassociated"] = "bitwise"

    def __call__(self, region: RegionGraph) -> int:
        backward = region.backward_outputs
        if len(backward) != len(self.demand):
            raise ValueError(f"{len(self.demand)} demands for {len(backward)} backward outputs")
        selected = [_select(region, i, v, d) for i, (v, d) in enumerate(zip(backward, self.demand, strict=True))]
        region.set_outputs(region.outputs[: region.num_forward_outputs] + tuple(selected))
        return sum(new is not old for new, old in zip(selected, backward, strict=True))


def _select(region: RegionGraph, index: int, value: fx.Node | None, demand: OutputDemand) -> fx.Node | None:
    if value is None or demand is None:
        return None
    if demand == "whole":
        return value
    start = _start_placeholder(region, index, value)
    part = insert_before(_behind(value), narrow, (value, demand.dim, start, demand.length), like=value)
    part.meta["partitioner_tag"] = "is_backward"
    part.meta["output"] = index
    return part


def _behind(value: fx.Node) -> fx.Node:
    """The first operator after a value: a slice taken there lets go of the whole value at once."""
    node = value.next
    while node.op == "placeholder":
        node = node.next
    return node


def _start_placeholder(region: RegionGraph, index: int, value: fx.Node) -> fx.Node:
    last = region.graph.find_nodes(op="placeholder")[-1]
    with region.graph.inserting_after(last):
        start = region.graph.placeholder(f"start_{index}")
    with fake_mode_of([value.meta["val"]]):
        fake = torch.empty((), dtype=torch.int64)
    start.meta = {"val": fake, "kind": "start", "partitioner_tag": "is_backward"}
    return start

"""Writes variants: a template specialised to a demand, each distinct one once.

Demand flows both ways through the regions of a step. From the top, tangents that the caller will not
provide make gradients zero; from the bottom, each region asks the ones above it only for the gradients
that its own rewritten graph still reads. `Specializer` holds the caches both ways share.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn

from chunkft_fx import passes
from chunkft_fx.capture.outline import Template
from chunkft_fx.errors import VerificationError
from chunkft_fx.graph.region import DenseGradient, OutputDemand, Pass, RegionGraph
from chunkft_fx.graph.rewrite import drop_dead, tensor_nbytes
from chunkft_fx.graph.storages import weight_views
from chunkft_fx.kernels.weight_gradient import Choose
from chunkft_fx.passes.region.eliminate import Eliminate
from chunkft_fx.passes.region.lower_triton import problems
from chunkft_fx.passes.region.prune_tangents import PruneTangents
from chunkft_fx.plan.policy import RegionPolicy
from chunkft_fx.program import run_passes
from chunkft_fx.torch_internals import graph_module, partition

log = logging.getLogger("chunkft_fx.program.variants")


@dataclass(frozen=True)
class Demand:
    """What is asked of a template: each backward output, which tangents are absent, and the plan's policy for it."""

    backward: tuple[OutputDemand, ...]
    absent: tuple[bool, ...]
    policy: RegionPolicy = field(default_factory=RegionPolicy)

    @property
    def forward_only(self) -> bool:
        """True when no gradient is asked for: nothing is saved and there is no backward."""
        return all(d is None for d in self.backward)


@dataclass(frozen=True)
class Source:
    """Where a backward input comes from: the ``index``-th of its kind.

    ``"primal"`` is an input of the region, ``"saved"`` an output of its forward, ``"tangent"`` a
    gradient from above, ``"start"`` the run-time start of the ``index``-th backward output's slice.
    """

    kind: Literal["primal", "saved", "tangent", "start"]
    index: int


@dataclass(eq=False)
class Variant:
    """A template specialised to one demand, partitioned into forward and backward graphs.

    ``forward`` takes the region's primals, then the run-time starts of the slices of the backward outputs
    ``forward_starts``, and returns its forward values, then what it saves.
    ``backward`` takes the values named by ``sources`` and returns the demanded backward outputs, in
    order. ``saved_nbytes`` counts the saved values that are not inputs of the region.
    """

    index: int
    template: Template
    demand: Demand
    forward: fx.GraphModule
    backward: fx.GraphModule | None
    sources: tuple[Source, ...]
    forward_starts: tuple[int, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    dense: tuple[DenseGradient, ...] = ()
    saved_nbytes: int = 0
    run_forward: Callable[[list[Any]], Any] | None = None
    run_backward: Callable[[list[Any]], Any] | None = None
    calls: dict[tuple[int, bool], nn.Module] = field(default_factory=dict, repr=False)  # see `program.region_call`

    @functools.cached_property
    def interface(self) -> Hashable:
        """All that the graph of a program depends on: equal for variants that can take each other's place in it."""
        asked = tuple(d is not None for d in self.demand.backward)
        results: Any = self.forward.graph.output_node().args[0]
        values = [r.meta["val"] if isinstance(r, fx.Node) else None for r in results]
        # sizes can be symbols, which are not hashable
        looks = tuple(
            (str(v.shape), str(v.stride()), v.dtype, v.device) if isinstance(v, torch.Tensor) else None for v in values
        )
        return self.template.index, self.backward is None, asked, self.sources, self.forward_starts, looks


# What a specialised region depends on: template, backward outputs, absent tangents, and the policy.
_Asked = tuple[int, tuple[OutputDemand, ...], tuple[bool, ...], RegionPolicy]

# Rewritten regions that are kept, the newest: each takes some 350 kB, and is made again in 30 ms where it is asked for.
KEPT_REGIONS = 64


@dataclass(frozen=True)
class Specialized:
    """A rewritten region graph before partitioning, and the tangents that it still reads."""

    region: RegionGraph
    counts: dict[str, int]
    tangents: tuple[bool, ...]


class Specializer:
    """Makes and caches specialised graphs and variants of the templates of one capture.

    ``choose`` decides for each weight gradient's slice who computes it; by default always the library. ``passes`` are
    the user's own, which run over every region graph behind the library's.
    """

    def __init__(self, choose: Choose | None = None, passes: Sequence[Pass] = ()) -> None:
        self._choose, self._passes = choose, tuple(passes)
        self._specialized: OrderedDict[_Asked, Specialized] = OrderedDict()
        self._reads: dict[_Asked, tuple[bool, ...]] = {}
        self._zeros: dict[tuple[int, tuple[bool, ...]], tuple[bool, ...]] = {}
        self._variants: dict[tuple[int, Demand], Variant] = {}

    @property
    def is_asked(self) -> bool:
        """Whether the length of a slice may decide who computes its gradient."""
        return self._choose is not None

    @property
    def variants(self) -> list[Variant]:
        """Every variant made so far, in the order they were made."""
        return list(self._variants.values())

    def zero_outputs(self, template: Template, absent: tuple[bool, ...]) -> tuple[bool, ...]:
        """For each backward output, whether it is zero because all tangents under it are absent."""
        key = (template.index, absent)
        if key not in self._zeros:
            region = template.graph.copy()
            PruneTangents(absent)(region)
            self._zeros[key] = tuple(n is None for n in region.backward_outputs)
        return self._zeros[key]

    def specialize(
        self, template: Template, backward: tuple[OutputDemand, ...], absent: tuple[bool, ...], policy: RegionPolicy
    ) -> Specialized:
        """Rewrite a copy of the template's graph for a demand; every backward output asked for must be non-zero."""
        policy = policy.of_joint_graph
        key = (template.index, backward, absent, policy)
        if key not in self._specialized:
            region = template.graph.copy()
            pruning: tuple[Pass, ...] = (PruneTangents(absent), Eliminate()) if any(absent) else ()
            steps = (*pruning, *passes.default_pipeline(backward, policy), *self._passes)
            counts = run_passes.over_region(region, steps)
            found = [] if self._choose is None else [(p, self._choose(p)) for p in problems(region)]
            choices = frozenset((p, by) for p, by in found if by is not None)
            counts |= run_passes.over_region(region, passes.lowering_pipeline(choices))
            used = tuple(bool(n.users) or n in region.backward_outputs for n in region.placeholders("tangent"))
            self._specialized[key] = Specialized(region, counts, used)
            self._reads[key] = used
            if len(self._specialized) > KEPT_REGIONS:
                self._specialized.popitem(last=False)
        self._specialized.move_to_end(key)
        return self._specialized[key]

    def reads(
        self, template: Template, backward: tuple[OutputDemand, ...], absent: tuple[bool, ...]
    ) -> tuple[bool, ...]:
        """For each tangent of a region whether its rewritten graph reads it."""
        known = self._reads.get((template.index, backward, absent, RegionPolicy().of_joint_graph))
        return self.specialize(template, backward, absent, RegionPolicy()).tangents if known is None else known

    def variant(self, template: Template, demand: Demand) -> Variant:
        """The variant for a demand; made, partitioned and cached on its first use."""
        key = (template.index, demand)
        found = self._variants.get(key)
        if found is None:
            make = self._forward_only if demand.forward_only else self._partitioned
            found = self._variants[key] = make(template, demand)
            log.debug("variant %d of template %d: %s", len(self._variants) - 1, template.index, demand)
        return found

    def _forward_only(self, template: Template, demand: Demand) -> Variant:
        region = template.graph.copy()
        region.graph.output_node().args = (region.outputs[: region.num_forward_outputs],)
        drop_dead(region.graph)
        for node in region.placeholders("tangent"):
            region.graph.erase_node(node)
        region.module.recompile()
        return Variant(len(self._variants), template, demand, region.module, None, ())

    def _partitioned(self, template: Template, demand: Demand) -> Variant:
        done = self.specialize(template, demand.backward, demand.absent, demand.policy)
        region = done.region.copy()
        names = [n.name for n in region.placeholders("primal")]
        starts = {n.name: i for n, i in zip(region.placeholders("start"), _sliced(demand), strict=True)}
        early = [n for n in region.placeholders("start") if any(_is_forward(u) for u in n.users)]
        for node in region.placeholders("start"):
            if node in early:
                node.meta["partitioner_tag"] = "is_forward"
            else:
                # torch's partitioner knows backward inputs by this part of their name
                node.target = f"tangents_{node.target}"
        joint = graph_module({}, region.graph)
        tangents = {n.name: i for i, n in enumerate(region.placeholders("tangent"))}
        asked = region.outputs[: region.num_forward_outputs] + tuple(
            n for n in region.backward_outputs if n is not None
        )
        region.graph.output_node().args = (asked,)
        for node in weight_views(region.graph, _weights(region.graph)):
            # torch takes single views anew where they are needed, but would save the items of several, as of `unbind`
            is_several = not isinstance(node.meta["val"], torch.Tensor)
            node.meta["must_recompute"] = is_several or node.target is operator.getitem
        forward, backward = partition(joint, region.num_forward_outputs, demand.policy.recompute)
        drop_dead(backward.graph)
        sources, nbytes = _resolve_saved(forward, backward, region.num_forward_outputs, names, tangents, starts)
        return Variant(
            len(self._variants), template, demand, forward, backward, sources, tuple(starts[n.name] for n in early),
            done.counts, tuple(region.dense), nbytes,
        )  # fmt: skip


def _is_forward(node: fx.Node) -> bool:
    return node.meta.get("partitioner_tag") == "is_forward"


def _weights(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.find_nodes(op="placeholder") if n.meta.get("is_parameter")]


def _sliced(demand: Demand) -> list[int]:
    return [i for i, d in enumerate(demand.backward) if d is not None and d != "whole"]


def _resolve_saved(
    forward: fx.GraphModule,
    backward: fx.GraphModule,
    num_outputs: int,
    primals: list[str],
    tangents: dict[str, int],
    starts: dict[str, int],
) -> tuple[tuple[Source, ...], int]:
    """Find each backward input, and shorten the forward's outputs to what backward cannot get elsewhere."""
    values = list(forward.graph.output_node().args[0])  # type: ignore[arg-type]
    position = {v.name: i for i, v in reversed(list(enumerate(values))) if isinstance(v, fx.Node)}
    kept = values[:num_outputs]
    sources: list[Source] = []
    nbytes = 0
    for node in list(backward.graph.find_nodes(op="placeholder")):
        name = str(node.target)
        plain = name.removeprefix("tangents_") if name not in tangents else name
        if not node.users:
            backward.graph.erase_node(node)
        elif name in tangents:
            sources.append(Source("tangent", tangents[name]))
        elif plain in starts:
            sources.append(Source("start", starts[plain]))
        elif name in primals:
            sources.append(Source("primal", primals.index(name)))
        elif position[name] < num_outputs:
            sources.append(Source("saved", position[name]))
        else:
            sources.append(Source("saved", len(kept)))
            kept.append(values[position[name]])
            nbytes += tensor_nbytes(node.meta["val"])
    for view in weight_views(forward.graph, _weights(forward.graph)):
        if view in kept:
            raise VerificationError(f"partition check: {view.name} is a view of a weight, and outlives its call")
    forward.graph.output_node().args = (tuple(kept),)
    drop_dead(forward.graph)
    forward.recompile()
    backward.recompile()
    return tuple(sources), nbytes

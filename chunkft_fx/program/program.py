"""Writes the program: the outer FX graph of one step for one chunk, region calls in the order they run.

Placeholders are the captured inputs (parameters, batch, constants), then the gradients that the caller
provides. Each region is called once forward, and once backward if a gradient is asked of it. The
output node holds three tuples: what the caller gets, the new values of mutated buffers, and the
gradients named by ``Program.gradients``.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from chunkft_fx import passes
from chunkft_fx.capture.capture import Capture, OutputName
from chunkft_fx.capture.outline import Outline, Region
from chunkft_fx.graph.region import OutputDemand, ProgramPass, SliceDemand
from chunkft_fx.plan.chunk import Slice
from chunkft_fx.plan.policy import Policy
from chunkft_fx.program import run_passes
from chunkft_fx.program.variants import Demand, Source, Specializer, Variant
from chunkft_fx.program.verify_streams import verify_streams
from chunkft_fx.torch_internals import graph_module


class RegionCall(nn.Module):
    """One direction of one region, as the program calls it: ``variant`` says what it computes."""

    def __init__(self, region: Region, variant: Variant, is_backward: bool) -> None:
        super().__init__()
        self.region = region
        self.variant = variant
        self.is_backward = is_backward

    def extra_repr(self) -> str:
        return f"template={self.region.template.index}, variant={self.variant.index}"


def region_call(region: Region, variant: Variant, is_backward: bool) -> RegionCall:
    """The call of one direction of a region in this variant, which the programs of a sweep share."""
    key = region.index, is_backward
    known = variant.calls.get(key)
    if not isinstance(known, RegionCall) or known.region is not region:
        known = variant.calls[key] = RegionCall(region, variant, is_backward)
    return known


@dataclass(frozen=True)
class Program:
    """A step's graph and what its gradient outputs mean.

    ``gradients`` gives for each gradient output the primal it belongs to (several outputs may name the
    same one: contributions to add up). ``variants`` lists the variant of every region, in order;
    ``lowest`` is the first region with a backward (the number of regions when there is none); ``counts`` says how many
    rewrites each pass made. ``write`` makes the graph, which takes a megabyte for 32 blocks and is only needed to
    `assemble` the program, and to show it.
    """

    gradients: tuple[str, ...]
    variants: tuple[Variant, ...]
    lowest: int
    counts: dict[str, int] = field(compare=False)
    write: Callable[[], fx.GraphModule] = field(repr=False, compare=False)

    @functools.cached_property
    def module(self) -> fx.GraphModule:
        """The graph as a module; written when it is asked for."""
        return self.write()

    def forget(self) -> None:
        """Drop the graph; it is written again when it is asked for again."""
        vars(self).pop("module", None)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def code(self) -> str:
        """The program as Python text."""
        return str(self.module.code)


@dataclass(frozen=True)
class ProgramSpec:
    """What is asked of a program.

    ``slices`` maps the names of parameters in the active chunk to their slices; ``absent`` names the
    tangents that will not be provided; ``inputs`` the non-parameter primals whose gradient is wanted.
    ``policy`` is the plan's, with the weights that have to be fetched as its ``streamed`` ones. ``state_nbytes`` are
    the bytes of optimizer states that come in during the step. ``passes`` are the user's own, behind the library's.
    """

    slices: Mapping[str, Slice]
    absent: frozenset[str]
    inputs: frozenset[str]
    policy: Policy
    device: torch.device
    state_nbytes: int = 0
    passes: tuple[ProgramPass, ...] = ()


def choose_variants(capture: Capture, outline: Outline, specializer: Specializer, spec: ProgramSpec) -> list[Variant]:
    """Decide every region's demand, and get its variant."""
    demands = region_demands(capture, outline, specializer, spec)
    return [specializer.variant(r.template, d) for r, d in zip(outline.regions, demands, strict=True)]


def build(
    capture: Capture,
    outline: Outline,
    spec: ProgramSpec,
    variants: list[Variant],
    hook: run_passes.Hook[fx.GraphModule] | None = None,
) -> Program:
    """The program that calls these variants, as `choose_variants` gives them, its passes run.

    Every program that passes changed is verified before it runs; ``hook`` is `run_passes.over_program`'s.
    """
    counts: dict[str, int] = {}

    def write() -> fx.GraphModule:
        module = _write(capture, outline, spec, variants)
        steps = (*passes.program_pipeline(spec.policy, spec.device, spec.state_nbytes), *spec.passes)
        counts.update(run_passes.over_program(module, steps, spec.policy, hook))
        if any(counts.values()):
            verify_streams(module, spec.policy)
        return module

    calls = reversed(list(zip(outline.regions, variants, strict=True)))
    gradients = tuple(r.gradients[i][1] for r, v in calls for i in _asked(v) if i < len(r.gradients))
    if spec.policy.takes_gradients:  # the program itself takes those of parameters
        gradients = tuple(primal for primal in gradients if primal not in capture.parameters)
    elif spec.policy.ranks > 1:  # it adds up those of a parameter
        gradients = tuple(p for i, p in enumerate(gradients) if p not in capture.parameters or p not in gradients[:i])
    lowest = next((i for i, v in enumerate(variants) if v.backward is not None), len(variants))
    program = Program(gradients, tuple(variants), lowest, counts, write)
    assert program.module is not None, "written here, so that a program that is wrong is not given away"
    return program


def own_inputs(capture: Capture) -> frozenset[str]:
    """The primals that each of several micro-batches has for itself; buffers that are only read are among them."""
    return frozenset(capture.primals).difference(capture.parameters, (primal for primal, _ in capture.mutations))


def _asked(variant: Variant) -> list[int]:
    """The backward outputs that a variant makes."""
    if variant.backward is None:
        return []
    return [i for i, d in enumerate(variant.demand.backward) if d is not None]


def region_demands(capture: Capture, outline: Outline, specializer: Specializer, spec: ProgramSpec) -> list[Demand]:
    """For each region what the step asks of it; see `program.variants` for the two directions demand flows."""
    zero = set(spec.absent)
    absent: dict[int, tuple[bool, ...]] = {}
    dead: dict[int, tuple[bool, ...]] = {}
    for region in reversed(outline.regions):
        absent[region.index] = tuple(name in zero for name in region.tangents)
        dead[region.index] = specializer.zero_outputs(region.template, absent[region.index])
        values_dead = dead[region.index][len(region.gradients) :]
        zero |= {name for name, is_zero in zip(region.values, values_dead, strict=True) if is_zero}
    wanted: set[str] = set()
    demands: list[Demand] = []
    for region in outline.regions:
        asked: list[OutputDemand] = [_gradient_demand(capture, primal, spec) for _, primal in region.gradients]
        asked += ["whole" if name in wanted else None for name in region.values]
        backward = tuple(None if z else d for d, z in zip(asked, dead[region.index], strict=True))
        policy = spec.policy.of_region(region.index, region.template.has_head).of_variant
        demand = Demand(backward, absent[region.index], policy)
        if demand.forward_only:
            demand = Demand(backward, (False,) * len(region.tangents))
        else:
            reads = specializer.reads(region.template, backward, demand.absent)
            wanted |= {name for name, is_read in zip(region.tangents, reads, strict=True) if is_read}
        demands.append(demand)
    return demands


def _gradient_demand(capture: Capture, primal: str, spec: ProgramSpec) -> OutputDemand:
    name = capture.parameters.get(primal)
    if name is None:
        return "whole" if primal in spec.inputs else None
    part = spec.slices.get(name)
    if part is None:
        return None
    return "whole" if part.is_whole else SliceDemand(part.dim, part.length)


def _write(capture: Capture, outline: Outline, spec: ProgramSpec, variants: list[Variant]) -> fx.GraphModule:
    graph = fx.Graph()
    modules: dict[str, nn.Module] = {}
    env: dict[str, fx.Node] = {}
    written = {primal: i for i, (primal, _) in enumerate(capture.mutations)}
    own = own_inputs(capture)
    for name in [*capture.primals, *capture.constants]:
        env[name] = graph.placeholder(_readable(capture.parameters.get(name, name)))
        env[name].meta["parameter"] = capture.parameters.get(name)
        env[name].meta["mutation"] = written.get(name)
        env[name].meta["is_own"] = name in own
    for name in capture.tangents:
        if name not in spec.absent:
            env[name] = graph.placeholder(name)
            env[name].meta["is_own"] = True
    saved: dict[int, fx.Node] = {}
    for region, variant in zip(outline.regions, variants, strict=True):
        given: list[Any] = [env[name] for name in region.primals]
        given += [_start(capture, region, i, spec) for i in variant.forward_starts]
        call = _call(graph, modules, region, variant, given, is_backward=False)
        saved[region.index] = call
        for i, name in enumerate(region.forward):
            env[name] = _item(graph, call, i, variant)
    outputs = tuple(env[str(o)] if isinstance(o, OutputName) else o for o in capture.outputs)
    mutations = tuple(env[new] for _, new in capture.mutations)
    gradients: list[fx.Node] = []
    for region, variant in reversed(list(zip(outline.regions, variants, strict=True))):
        if variant.backward is None:
            continue
        arguments = [
            _argument(graph, capture, region, saved[region.index], variant, source, env, spec)
            for source in variant.sources
        ]
        call = _call(graph, modules, region, variant, arguments, is_backward=True)
        for position, i in enumerate(_asked(variant)):
            item = _item(graph, call, position)
            if i < len(region.gradients):
                gradients.append(item)
                item.meta["gradient_of"] = capture.parameters.get(region.gradients[i][1])
            else:
                env[region.values[i - len(region.gradients)]] = item
    graph.output((outputs, mutations, tuple(gradients)))
    for node in list(graph.nodes):
        if node.target is operator.getitem and not node.users:
            graph.erase_node(node)
    root = nn.Module()
    for name, module in modules.items():
        root.add_module(name, module)
    return graph_module(root, graph)


def _call(
    graph: fx.Graph, modules: dict[str, nn.Module], region: Region, variant: Variant, args: list[Any], is_backward: bool
) -> fx.Node:
    name = f"{_readable(region.label)}_{region.index}_{'backward' if is_backward else 'forward'}"
    modules[name] = region_call(region, variant, is_backward)
    call = graph.call_module(name, tuple(args))
    call.meta["region"] = region.index
    return call


def _item(graph: fx.Graph, call: fx.Node, index: int, variant: Variant | None = None) -> fx.Node:
    """An item of a region call; with the variant of a forward call, its ``meta["val"]`` says what it looks like."""
    getitem: Callable[..., Any] = operator.getitem
    item = graph.call_function(getitem, (call, index))
    if variant is not None:
        results: Any = variant.forward.graph.output_node().args[0]
        item.meta["val"] = results[index].meta["val"] if isinstance(results[index], fx.Node) else None
    return item


def _argument(
    graph: fx.Graph,
    capture: Capture,
    region: Region,
    forward: fx.Node,
    variant: Variant,
    source: Source,
    env: dict[str, fx.Node],
    spec: ProgramSpec,
) -> Any:
    kind, index = source.kind, source.index
    if kind == "primal":
        return env[region.primals[index]]
    if kind == "saved":
        return env[region.forward[index]] if index < len(region.forward) else _item(graph, forward, index, variant)
    if kind == "tangent":
        return env[region.tangents[index]]
    return _start(capture, region, index, spec)


def _start(capture: Capture, region: Region, index: int, spec: ProgramSpec) -> int:
    """The start of the slice of a region's ``index``-th gradient."""
    return spec.slices[capture.parameters[region.gradients[index][1]]].start


def _readable(path: str) -> str:
    name = re.sub(r"\W", "_", path)
    return f"part_{name}" if name[:1].isdigit() else name

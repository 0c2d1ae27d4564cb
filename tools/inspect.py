"""``chunkft inspect``: show the plan, the program and the region graphs, before and after each pass."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, fx, nn

import chunkft_fx
from chunkft_fx.bytes import format_bytes
from chunkft_fx.capture.outline import Template
from chunkft_fx.errors import NotPlanned, OptionError
from chunkft_fx.graph.region import DenseGradient, Pass, RegionGraph, SliceDemand
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.passes import Eliminate, PruneTangents, default_pipeline
from chunkft_fx.program import run_passes
from chunkft_fx.program.variants import Variant
from chunkft_fx.tools.console import quiet, run_command
from chunkft_fx.tools.load import check_config, pick_device, pick_dtype, reasons, source
from chunkft_fx.tools.show import pieces
from chunkft_fx.tools.training.options import at_least, check_compile_options, chunk_count, json_object

# Smaller weight gradients (norms, biases) cost nothing worth reporting when they stay dense.
REPORTED_NUMEL = 4096

Inputs = dict[str, Tensor]


def command(
    model: Annotated[str, typer.Argument(help="tiny:NAME (random weights), a folder, a hub name or a .gguf file.")],
    config: Annotated[str, typer.Option(help="Changes to the model's config as a JSON object: random weights.")] = "",
    budget: Annotated[str, typer.Option(help='Device memory to stay within, such as "24GB".')] = "24GB",
    chunks: Annotated[str, typer.Option(help='A number of chunks, or "auto"; 8 if a step trains one.')] = "",
    full: Annotated[bool, typer.Option(help="A step that covers all parameters, and its pieces.")] = False,
    update: Annotated[
        str, typer.Option(help='When AdamW changes weights (with --full): "step", "late", or "backward".')
    ] = "step",
    chunk: Annotated[int, typer.Option(help="The chunk whose program is shown.")] = 0,
    seq_len: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Sequences in the batch.")] = 2,
    template: Annotated[int | None, typer.Option(help="Show this template's graph before and after each pass.")] = None,
    pass_name: Annotated[str, typer.Option("--pass", help="Only this pass (with --template).")] = "",
    ops: Annotated[bool, typer.Option(help="Differences of operator counts instead of graphs.")] = False,
    program_passes: Annotated[bool, typer.Option(help="Show the program behind each of its passes.")] = False,
    coverage: Annotated[bool, typer.Option(help="List weight gradients that stay dense; exit 1 if any.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    backend: Annotated[str, typer.Option(help="Whose operators to show: inductor (decomposed) or eager.")] = "inductor",
) -> None:
    """Print the plan and program of MODEL for one chunk, or what --full, --template or --coverage ask for."""
    quiet()
    count, covers = chunk_count(chunks or ("auto" if full else "8")), "all" if full else "one"
    check_compile_options(budget, "ascending", "auto", backend, covers, count)
    where = pick_device(device)
    plain, inputs = build(model, config, pick_dtype(dtype, where), where, batch_size, seq_len)
    compiled = chunkft_fx.compile(plain, budget, chunks=count, backend=backend, coverage=covers)
    optimizer = chunkft_fx.AdamW(compiled, update=update)
    if coverage:
        raise typer.Exit(1 if print_coverage(compiled, inputs) else 0)
    forward(compiled, inputs, chunk)
    assert compiled._training.optimizer is optimizer, "held until there is a plan, which is for its states"
    if template is not None:
        print_passes(variant_of(compiled, template), pass_name, ops)
        return
    if program_passes:
        print_program_passes(compiled)
        return
    print(compiled.plan)
    print(compiled.program.code)
    for line in summary(compiled):
        print(line)
    if full:
        print(pieces.table(compiled))


def build(
    model: str, config: str, dtype: torch.dtype, device: torch.device, batch_size: int, seq_len: int
) -> tuple[nn.Module, Inputs]:
    """The model to look at, in training mode, and inputs that give it a loss."""
    from chunkft_fx.tools import zoo

    at_least("batch_size", batch_size, 1)
    at_least("seq_len", seq_len, 1)
    if model.startswith("tiny:"):
        name = model.removeprefix("tiny:")
        if name not in zoo.FAMILIES:
            raise OptionError(f"{model!r} is not known; choose one of {', '.join(f'tiny:{n}' for n in zoo.FAMILIES)}")
        if config:
            raise OptionError(f"--config changes the config of a folder or hub name; {model!r} has none")
        tiny, batch = zoo.tiny(name, dtype)
        return tiny.to(device), {k: v.to(device) for k, v in batch(batch_size, seq_len, 0).items()}
    with torch.device("meta") if device.type == "meta" else contextlib.nullcontext():
        plain = _from_transformers(model, config, dtype, is_random=bool(config) or device.type == "meta")
    check_config(model, plain.config, seq_len)
    plain = plain.to(device).train()
    ids = torch.randint(0, plain.config.vocab_size, (batch_size, seq_len), generator=torch.Generator().manual_seed(0))
    return plain, {"input_ids": ids.to(device), "labels": ids.to(device)}


def _from_transformers(model: str, config: str, dtype: torch.dtype, is_random: bool) -> Any:
    """A model of the class that its config, changed by ``config``, names: with its weights, or with random ones."""
    import transformers

    place, options = source(model)
    changes = json_object(config or "{}")
    with reasons(model):
        settings = transformers.AutoConfig.from_pretrained(place, **options, **changes)
        kind = getattr(transformers, (settings.architectures or ["AutoModelForCausalLM"])[0])
        if not is_random:
            return kind.from_pretrained(place, dtype=dtype, **options)
        make = getattr(kind, "from_config", kind)
        return make(settings).to(dtype)


def forward(compiled: CompiledModule, inputs: Inputs, chunk: int) -> None:
    """Build and run the forward part of a chunk's program; with chunks="auto" the first call also makes the plan."""
    try:
        compiled.activate(chunk)
    except NotPlanned:
        compiled(**inputs)
        compiled.activate(chunk)
    compiled(**inputs)


def summary(compiled: CompiledModule) -> list[str]:
    """What passes did: a line for the program, then one a region with its template, variant and saved bytes."""
    done = ", ".join(f"{name} {count}" for name, count in compiled.program.counts.items() if count) or "nothing to do"
    lines = [f"program: {done}"]
    for v in compiled.program.variants:
        graph = v.template.graph.graph
        done = ", ".join(f"{name} {count}" for name, count in v.counts.items() if count) or "forward only"
        lines.append(
            f"template {v.template.index} ({len(graph.nodes)} nodes), variant {v.index}: {done}; "
            f"saves {format_bytes(v.saved_nbytes)}"
        )
    return lines


def variant_of(compiled: CompiledModule, template: int) -> Variant:
    """The program's variant of a template of which the most is asked: slices, then any backward, then forward only."""
    found = [v for v in compiled.program.variants if v.template.index == template]
    if not found:
        raise OptionError(f"template {template} does not exist; there are {len(compiled.templates)}, from 0")
    return max(
        found, key=lambda v: [sum(isinstance(d, SliceDemand) for d in v.demand.backward), v.backward is not None]
    )


def print_passes(variant: Variant, pass_name: str, ops: bool) -> None:
    """Run the passes on a variant's template again, and print what each made of it."""
    demand = variant.demand
    steps: tuple[Pass, ...] = (
        PruneTangents(demand.absent),
        Eliminate(),
        *default_pipeline(demand.backward, demand.policy),
    )
    names = list(dict.fromkeys(step.name for step in steps))
    if pass_name and pass_name not in names:
        raise OptionError(f"pass {pass_name!r} is not in the pipeline; it has {', '.join(names)}")
    print(f"demand: {demand}")
    region = variant.template.graph.copy()
    show = _show_ops if ops else _show_graphs
    run_passes.over_region(region, steps, _RegionPrinter(region, pass_name, show))


class _RegionPrinter:
    """A hook between passes that keeps the region graph as it was before the pass that comes next."""

    def __init__(self, region: RegionGraph, only: str, show: Callable[[fx.Graph, fx.Graph], None]) -> None:
        self.before = region.copy()
        self.only = only
        self.show = show

    def __call__(self, name: str, region: RegionGraph, rewrites: int, seconds: float) -> None:
        if self.only in ("", name):
            print(f"\n== {name}: {rewrites} rewrites in {seconds * 1e3:.1f} ms")
            self.show(self.before.graph, region.graph)
        self.before = region.copy()


def print_program_passes(compiled: CompiledModule) -> None:
    """Run the passes on the program again, and print its code behind each pass that changed it."""

    def show(name: str, module: fx.GraphModule, rewrites: int, seconds: float) -> None:
        print(f"\n== {name}: {rewrites} rewrites in {seconds * 1e3:.1f} ms")
        print(module.code if rewrites else "the program did not change")

    compiled._programs.rewritten(show)


def _show_graphs(before: fx.Graph, after: fx.Graph) -> None:
    if str(before) == str(after):
        print("the graph did not change")
        return
    print(f"-- before\n{_text(before)}\n-- after\n{_text(after)}")


def _show_ops(before: fx.Graph, after: fx.Graph) -> None:
    counts = op_differences(before, after)
    for op, (was, now) in counts.items():
        print(f"{op}: {was} -> {now}")
    if not counts:
        print("the same operators")


def op_differences(before: fx.Graph, after: fx.Graph) -> dict[str, tuple[int, int]]:
    """How often each operator was and is called, where that changed."""
    was, now = (collections.Counter(str(n.target) for n in g.nodes if n.op == "call_function") for g in (before, after))
    return {op: (was[op], now[op]) for op in sorted(was | now) if was[op] != now[op]}


def _text(graph: fx.Graph) -> str:
    module = fx.GraphModule(nn.Module(), graph)
    return str(module.print_readable(print_output=False))


def dense_gradients(compiled: CompiledModule) -> list[tuple[Template, DenseGradient]]:
    """Weight gradients of at least `REPORTED_NUMEL` elements that some chunk seen so far computes whole to cut it."""
    found = {}
    for variant in compiled.variants:
        for dense in variant.dense:
            gradient = variant.template.graph.backward_outputs[dense.output]
            if gradient is not None and gradient.meta["val"].numel() >= REPORTED_NUMEL:
                place = (variant.template.index, dense.output, dense.op, dense.reason)
                found[place] = (variant.template, dense)
    return list(found.values())


def print_coverage(compiled: CompiledModule, inputs: Inputs) -> int:
    """Visit all chunks and print the weight gradients that stay dense; returns how many there are."""
    forward(compiled, inputs, 0)
    for k in range(1, len(compiled.plan.chunks)):
        forward(compiled, inputs, k)
    found = dense_gradients(compiled)
    for template, dense in found:
        print(
            f"dense: {dense.op} in {dense.module or 'the model itself'} (template {template.index}, "
            f"node {dense.node}), {format_bytes(dense.nbytes)} computed whole: {dense.reason}"
        )
    print(f"{len(found)} weight gradient(s) of {REPORTED_NUMEL} elements or more stay dense")
    return len(found)


if __name__ == "__main__":
    run_command(command)

"""``chunkft plan``: show what a budget leads to, what was not chosen and why, and the memory of a step over time.

With ``--rates`` it plans for another machine, by the rates that are given: without that machine, and without weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import chunkft_fx
from chunkft_fx.bytes import format_bytes
from chunkft_fx.errors import OptionError
from chunkft_fx.plan.plan import Plan
from chunkft_fx.predict.step_clock import Span
from chunkft_fx.predict.step_memory import Moment
from chunkft_fx.tools.console import quiet
from chunkft_fx.tools.inspect import build, forward
from chunkft_fx.tools.load import pick_device, pick_dtype
from chunkft_fx.tools.rates import parse_link, parse_rates
from chunkft_fx.tools.show import clock
from chunkft_fx.tools.training.options import at_least, check_compile_options, chunk_count, turn_steps

# Of host memory, of which nothing is taken to plan: the plan says how much training needs.
NO_LIMIT = 2**62
NO_PROGRAM = (
    "timeline shows the memory of a program, and for another machine none is written; leave out --rates, or give "
    "--coverage all, of which a step's time is shown"
)
NO_TRACE = "trace writes the times of a step that covers all parameters; give --coverage all with it"


def command(
    model: Annotated[str, typer.Argument(help="tiny:NAME (random weights), a folder, a hub name or a .gguf file.")],
    config: Annotated[str, typer.Option(help="Changes to the model's config as a JSON object: random weights.")] = "",
    budget: Annotated[str, typer.Option(help='Device memory to stay within, such as "24GB".')] = "24GB",
    chunks: Annotated[str, typer.Option(help='A number of chunks, or "auto".')] = "auto",
    interval: Annotated[
        str, typer.Option(help="Optimizer steps on each chunk at a turn; auto: 40 or more in a sweep.")
    ] = "auto",
    chunk: Annotated[int, typer.Option(help="The chunk whose step --timeline shows.")] = 0,
    seq_len: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Sequences in the batch.")] = 1,
    steps: Annotated[int, typer.Option(help="Steps of the run that each weight's updates are told for.")] = 1000,
    explain: Annotated[bool, typer.Option(help="Show the choices that were not taken, and why.")] = False,
    timeline: Annotated[
        bool,
        typer.Option(help="Show the memory of a step region by region, and its time where it covers all parameters."),
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write when a step that covers all parameters does what, for chrome://tracing or Perfetto."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    backend: Annotated[str, typer.Option(help="inductor or eager.")] = "inductor",
    coverage: Annotated[str, typer.Option(help='"one" chunk a step, "all" parameters, or "auto".')] = "auto",
    update: Annotated[
        str, typer.Option(help='When AdamW changes weights: at the "step", from it on ("late"), or in the "backward".')
    ] = "step",
    master: Annotated[
        str, typer.Option(help='float32 masters of bfloat16 weights: "float32" or "remainder".')
    ] = "float32",
    state_dtype: Annotated[str, typer.Option(help="AdamW's moments: float32, bfloat16 or 8bit.")] = "float32",
    rates: Annotated[
        str,
        typer.Option(help='Plan for another machine: "matmul=165T,memory=1T,link=25G", operations and bytes a second.'),
    ] = "",
    ranks: Annotated[
        int, typer.Option(help="With --rates: GPUs that train the model together, each with a batch of this size.")
    ] = 1,
    link: Annotated[
        str,
        typer.Option(help='The link between them: "nvlink", "pcie", or its bus bandwidth in bytes a second, as 240G.'),
    ] = "nvlink",
) -> None:
    """Plan the training of MODEL within a budget. One forward runs, on random tokens: that is how a plan is made.

    With --rates nothing runs: the plan is for a machine of those rates, its weights are never read.
    """
    quiet()
    count, turn = chunk_count(chunks), turn_steps(interval)
    at_least("steps", steps, 1)
    check_compile_options(budget, "ascending", turn, backend)
    if rates and timeline and coverage == "one":
        raise OptionError(NO_PROGRAM)
    if trace is not None and coverage == "one":
        raise OptionError(NO_TRACE)
    if rates and device != "auto":
        raise OptionError(f"--rates are of a GPU elsewhere, which --device {device} is not; leave out one of them")
    between = parse_link(ranks, link)
    if ranks > 1 and not rates:
        raise OptionError(
            "--ranks predicts for GPUs elsewhere; give their --rates, or run training itself on several ranks"
        )
    where = torch.device("cpu") if rates else pick_device(device)
    number = torch.bfloat16 if rates and dtype == "auto" else pick_dtype(dtype, where)
    known = parse_rates(rates, str(number).removeprefix("torch.")) if rates else None
    plain, inputs = build(model, config, number, torch.device("meta" if known else "cpu"), batch_size, seq_len)
    if known is not None:
        plain, inputs = plain.to_empty(device="cpu"), {n: torch.zeros_like(t, device="cpu") for n, t in inputs.items()}
    compiled = chunkft_fx.compile(
        plain, budget, chunks=count, interval=turn, backend=backend, device=where, coverage=coverage
    )
    optimizer = chunkft_fx.AdamW(compiled, update=update, master=master, state_dtype=state_dtype, host_budget=NO_LIMIT)
    if known is None:
        forward(compiled, {name: t.to(where) for name, t in inputs.items()}, chunk)
    else:
        compiled._training.plan_elsewhere(inputs, known, between)
    assert compiled._training.optimizer is optimizer, "held until there is a plan, which is for its states"
    if compiled.plan.coverage == "one" and (trace is not None or (rates and timeline)):
        raise OptionError(NO_PROGRAM if trace is None else NO_TRACE)
    if trace is not None:
        write_trace(compiled.spans, trace)
    if as_json:
        print(compiled.plan.to_json())
        return
    print(compiled.plan)
    if ranks > 1:
        print(f"predicted for {ranks} ranks, joined at {between.nbytes_per_s / 1e9:.0f} GB/s; figures are of each rank")
    for line in rate_lines(compiled.plan, batch_size * seq_len, ranks):
        print(line)
    print(run_line(compiled.plan, batch_size * seq_len, steps))
    if explain:
        print(compiled.plan.explain())
    if timeline and known is None:
        show(compiled.timeline)
    if timeline and compiled.spans:
        print(clock.table(compiled.spans))


def rate_lines(plan: Plan, tokens: int, ranks: int = 1) -> list[str]:
    """Tokens a second of all ranks, and with how many a step all copies hide, as far as times are known."""
    of = f" of {ranks} ranks" if ranks > 1 else ""
    found = [f"{ranks * tokens / plan.predicted_step_us * 1e6:.0f} tokens/s{of}"] if plan.predicted_step_us else []
    if plan.link is not None and plan.link.hides_from:
        found.append(
            f"all that moves beside the backward hides from {plan.link.hides_from * tokens:.0f} tokens a step on"
        )
    return found


def run_line(plan: Plan, tokens: int, steps: int) -> str:
    """What a run of so many steps, of so many tokens each, does to a weight, and what a sweep takes of it."""
    fewest, most = plan.updates_in(steps)
    updates = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    sweep = f"a sweep takes {plan.sweep_steps * tokens:,} tokens"
    return f"{steps:,} steps ({steps * tokens:,} tokens) update each weight {updates} times; {sweep}"


def write_trace(spans: tuple[Span, ...], path: Path) -> None:
    """Write the spans of a step; raises `OptionError` where there are none."""
    if not spans:
        raise OptionError(
            "trace has nothing to write: no times of this machine are known; plan on a GPU, or for one with --rates"
        )
    path.write_text(clock.chrome_trace(spans))


def show(moments: tuple[Moment, ...]) -> None:
    """Print the moments of a step as a table: what is alive beside weights, states and held gradients."""
    names = list(dict.fromkeys(name for m in moments for name, nbytes in m.terms.items() if nbytes))
    table = Table("moment", "bytes", *names)
    largest = max(m.nbytes for m in moments)
    for m in moments:
        sizes = (m.nbytes, *(m.terms.get(name, 0) for name in names))
        table.add_row(m.label, *(format_bytes(n) for n in sizes), style="bold" if m.nbytes == largest else None)
    Console().print(table)

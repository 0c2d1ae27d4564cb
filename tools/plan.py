"""``chunkft plan``: show what a budget leads to, what was not chosen and why, and the memory of a step over time."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import chunkft_fx
from chunkft_fx.bytes import format_bytes
from chunkft_fx.predict.step_memory import Moment
from chunkft_fx.tools.console import quiet
from chunkft_fx.tools.inspect import build, forward
from chunkft_fx.tools.load import pick_device, pick_dtype
from chunkft_fx.tools.training.options import check_compile_options, chunk_count


def command(
    model: Annotated[str, typer.Argument(help="tiny:NAME (random weights), a folder, a hub name or a .gguf file.")],
    config: Annotated[str, typer.Option(help="Changes to the model's config as a JSON object: random weights.")] = "",
    budget: Annotated[str, typer.Option(help='Device memory to stay within, such as "24GB".')] = "24GB",
    chunks: Annotated[str, typer.Option(help='A number of chunks, or "auto".')] = "auto",
    chunk: Annotated[int, typer.Option(help="The chunk whose step --timeline shows.")] = 0,
    seq_len: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Sequences in the batch.")] = 1,
    explain: Annotated[bool, typer.Option(help="Show the choices that were not taken, and why.")] = False,
    timeline: Annotated[bool, typer.Option(help="Show the memory of a step, region by region.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    backend: Annotated[str, typer.Option(help="inductor or eager.")] = "inductor",
) -> None:
    """Plan the training of MODEL within a budget. One forward runs, on random tokens: that is how a plan is made."""
    quiet()
    count = chunk_count(chunks)
    check_compile_options(budget, "ascending", 1, backend)
    where = pick_device(device)
    plain, inputs = build(model, config, pick_dtype(dtype, where), torch.device("cpu"), batch_size, seq_len)
    compiled = chunkft_fx.compile(plain, budget, chunks=count, backend=backend, device=where)
    forward(compiled, {name: t.to(where) for name, t in inputs.items()}, chunk)
    if as_json:
        print(compiled.plan.to_json())
        return
    print(compiled.plan)
    if explain:
        print(compiled.plan.explain())
    if timeline:
        show(compiled.timeline)


def show(moments: tuple[Moment, ...]) -> None:
    """Print the moments of a step as a table: what is alive beside weights, states and held gradients."""
    names = list(dict.fromkeys(name for m in moments for name, nbytes in m.terms.items() if nbytes))
    table = Table("moment", "bytes", *names)
    largest = max(m.nbytes for m in moments)
    for m in moments:
        sizes = (m.nbytes, *(m.terms.get(name, 0) for name in names))
        table.add_row(m.label, *(format_bytes(n) for n in sizes), style="bold" if m.nbytes == largest else None)
    Console().print(table)

"""A plan as a table that a person can read: plain text, no colours, of limited width."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from chunkft_fx.bytes import format_bytes

if TYPE_CHECKING:
    from chunkft_fx.plan.plan import Chunk, Considered, Plan, Slice

WIDTH = 120
# Longer plans show this many chunks at the beginning and at the end.
SHOWN = 12


def render(plan: Plan) -> str:
    """The plan's head (budget, prediction, schedule) and one line per chunk, as text of at most 120 columns."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    saved = bool(plan.save_from)
    table.add_column("chunk", justify="right")
    table.add_column("slices", overflow="fold")
    for title in ("elements", "bytes", *(("keeps activations",) if saved else ())):
        table.add_column(title, justify="right", no_wrap=True)
    for k in _shown(len(plan.chunks)):
        if k is None:
            table.add_row("…", f"… {len(plan.chunks) - 2 * SHOWN} more chunks …")
            continue
        chunk = plan.chunks[k]
        kept = (_kept(plan, k),) if saved else ()
        table.add_row(str(k), _slices(chunk), f"{chunk.numel:,}", format_bytes(chunk.nbytes), *kept)
    return _text(_head(plan), table)


def explain(plan: Plan) -> str:
    """The choices that were not taken, one a line, and what kept each from being taken."""
    if not plan.considered:
        return "no other choice was considered: the plan was not made for a batch, or there was none"
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in ("chunks", "streamed", "buffers", "recompute", "offload", "split", "needs", "step"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("why not")
    for c in plan.considered:
        sizes = (c.chunks, c.streamed, c.depth if c.streamed else "", c.save_from, c.offload_below, c.head_split)
        step = "" if c.step_us is None else f"{c.step_us / 1e3:.1f} ms"
        table.add_row(*(str(n) for n in sizes), format_bytes(c.nbytes), step, _reason(plan, c))
    meanings = "streamed: how many regions; recompute, offload: the regions below; split: of the head's blocks"
    return _text([f"choices beside the plan's, for {plan.batch}", meanings], table)


def _reason(plan: Plan, c: Considered) -> str:
    over = c.nbytes - plan.budget_bytes
    if over > 0:
        return f"{format_bytes(over)} over budget, most of it {c.largest}"
    return "fits, but is not better"


def _text(head: list[str], table: Table) -> str:
    out = StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, markup=False, highlight=False, emoji=False)
    for line in head:
        console.print(line)
    console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _head(plan: Plan) -> list[str]:
    if plan.predicted_peak_bytes is None:
        peak = "predicted peak not known before the first training batch"
    else:
        share = plan.predicted_peak_bytes / plan.budget_bytes
        where = f", in {plan.peak_at}" if plan.peak_at else ""
        peak = f"predicted peak {format_bytes(plan.predicted_peak_bytes)} ({share:.0%}) for {plan.batch}{where}"
    steps = "1 step" if plan.interval == 1 else f"{plan.interval} steps"
    seed = f" (seed {plan.seed})" if plan.order == "random" else ""
    terms = [f"  {format_bytes(nbytes):>11}  {name}" for name, nbytes in plan.terms]
    time = "" if plan.predicted_step_us is None else f", a step predicted to take {plan.predicted_step_us / 1e3:.0f} ms"
    schedule = f"{len(plan.chunks)} chunk(s), {plan.order} order{seed}, {steps} each{time}"
    away = [f"{len(plan.streamed)} weights stay in host memory, {plan.depth} buffers"] if plan.streamed else []
    split = [f"the head holds 1/{plan.head_split} of its usual block of logits"] if plan.head_split > 1 else []
    return [f"budget {format_bytes(plan.budget_bytes)}, {peak}", *terms, schedule, *away, *split]


def _kept(plan: Plan, k: int) -> str:
    offloads = plan.offload_below[k] if plan.offload_below else 0
    away = f", offloads below {offloads}" if offloads else ""
    return f"from region {plan.save_from[k]}{away}"


def _shown(count: int) -> list[int | None]:
    """The chunks to show; None stands for those left out."""
    if count <= 2 * SHOWN + 1:
        return list(range(count))
    return [*range(SHOWN), None, *range(count - SHOWN, count)]


def _slices(chunk: Chunk) -> str:
    """The first and the last slice, and how many lie between them."""
    first, last = _slice(chunk.slices[0]), _slice(chunk.slices[-1])
    if len(chunk.slices) == 1:
        return first
    between = f" … {len(chunk.slices) - 2} more … " if len(chunk.slices) > 2 else ", "
    return first + between + last


def _slice(s: Slice) -> str:
    """``name`` of a whole parameter, else ``name[128:256 of 512]`` with colons for the dimensions before."""
    if s.is_whole:
        return s.name
    return f"{s.name}[{':, ' * s.dim}{s.start}:{s.start + s.length} of {s.size}]"

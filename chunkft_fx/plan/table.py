"""Writes a plan as a table that a person can read: plain text, no colours, of limited width."""

from __future__ import annotations

from dataclasses import dataclass
from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from chunkft_fx.bytes import format_bytes
from chunkft_fx.plan.chunk import Chunk, Slice
from chunkft_fx.plan.policy import LinkUse, Policy
from chunkft_fx.plan.schedule import SAFE_SHARE, WARMUP_UPDATES, short_turns, sweep_steps, usual_turns

WIDTH = 120
# Longer plans show this many chunks at the beginning and at the end.
SHOWN = 12


@dataclass(frozen=True)
class Considered:
    """A choice that was not taken: what it needs at its peak, most of it for ``largest``, and its predicted mean step.

    ``streamed`` counts regions; which weights these are is not in its ``policy``. ``step_us`` is None where no times
    are known.
    """

    chunks: int
    streamed: int
    policy: Policy
    nbytes: int
    step_us: float | None
    largest: str


class PlanTables:
    """The tables of a plan, which has these fields (`plan.plan.Plan` says what they mean)."""

    budget_bytes: int
    chunks: tuple[Chunk, ...]
    order: str
    interval: int
    warms_up: bool
    seed: int
    policy: Policy
    predicted_peak_bytes: int | None
    predicted_step_us: float | None
    peak_at: str
    considered: tuple[Considered, ...]
    terms: tuple[tuple[str, int], ...]
    host_terms: tuple[tuple[str, int], ...]
    link: LinkUse | None
    batch: str
    coverage: str
    coverage_reason: str

    def __str__(self) -> str:
        """For people: budget, predicted peak and its terms, policy, and a line a chunk, in at most 120 columns."""
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("chunk", justify="right")
        table.add_column("slices", overflow="fold")
        for title in ("elements", "bytes"):
            table.add_column(title, justify="right", no_wrap=True)
        for k in _shown(len(self.chunks)):
            if k is None:
                table.add_row("…", f"… {len(self.chunks) - 2 * SHOWN} more chunks …")
                continue
            chunk = self.chunks[k]
            table.add_row(str(k), slices_text(chunk), f"{chunk.numel:,}", format_bytes(chunk.nbytes))
        return text(_head(self), table)

    def explain(self) -> str:
        """The choices that were not taken, one a line, with what each would have needed and why it was not taken."""
        if not self.considered:
            return "no other choice was considered: the plan was not made for a batch, or there was none"
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        decisions = tuple(self.considered[0].policy.described())
        for title in ("chunks", "streamed", *decisions, "needs", "step", "sweep"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("why not")
        for c in self.considered:
            step = "" if c.step_us is None else f"{c.step_us / 1e3:.1f} ms"
            sweep = "" if c.step_us is None else duration(c.step_us * c.chunks)
            decided = c.policy.described().values()
            table.add_row(
                str(c.chunks), str(c.streamed), *decided, format_bytes(c.nbytes), step, sweep, _reason(self, c)
            )
        meanings = ["streamed: how many regions; recompute, offload: the regions below; split: of the head's blocks"]
        meanings.append("sweep: of one step a chunk, whatever the interval is")
        if self.link is not None:
            meanings.append("step: by sums of times, which compare choices; the plan's own time is that of its program")
        return text([f"choices beside the plan's, for {self.batch}", *meanings], table)


def _reason(plan: PlanTables, c: Considered) -> str:
    over = c.nbytes - plan.budget_bytes
    if over > 0:
        return f"{format_bytes(over)} over budget, most of it {c.largest}"
    return "fits, but is not better"


def plain_table(*titles: str) -> Table:
    """A table to add rows to, its columns folded where they are too wide."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def text(head: list[str], table: Table) -> str:
    """Lines and a table as plain text of limited width."""
    out = StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, markup=False, highlight=False, emoji=False)
    for line in head:
        console.print(line)
    console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _head(plan: PlanTables) -> list[str]:
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
    kinds = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in plan.host_terms)
    host = [f"host memory {format_bytes(sum(n for _, n in plan.host_terms))}: {kinds}"] if kinds else []
    chosen = "one chunk" if plan.coverage == "one" else "all parameters"
    covers = [f"a step trains {chosen}: {plan.coverage_reason}"] if plan.coverage_reason else []
    decided = plan.policy.sentences() if plan.batch else []
    decided += [] if plan.link is None else plan.link.sentences()
    sweep = _sweep(plan)
    turn = len(plan.chunks), plan.interval
    turns = [said] if (said := short_turns(*turn) or usual_turns(*turn)) else []
    if plan.warms_up:
        turns += [
            f"chunks warm up: the first sweep takes {len(plan.chunks)} steps, and a rate above {SAFE_SHARE:.0%} of the "
            f"weights' root mean square rises to its value over the first {WARMUP_UPDATES} updates of each chunk"
        ]
    head = f"budget {format_bytes(plan.budget_bytes)}, {peak}"
    return [head, *terms, *host, schedule, sweep, *turns, *covers, *decided]


def _sweep(plan: PlanTables) -> str:
    """How long it takes until every weight was updated."""
    steps = sweep_steps(len(plan.chunks), plan.interval)
    if steps == 1:
        return "a sweep is one step, which updates every weight"
    times = "once" if plan.interval == 1 else f"{plan.interval} times"
    step_us = plan.predicted_step_us
    time = "" if step_us is None else f", predicted to take {duration(step_us * steps)}"
    return f"a sweep of {steps:,} steps updates every weight {times}{time}"


def duration(us: float) -> str:
    """Microseconds for people: milliseconds below a second, then seconds."""
    return f"{us / 1e3:.0f} ms" if us < 1e6 else f"{us / 1e6:,.1f} s"


def _shown(count: int) -> list[int | None]:
    """The chunks to show; None stands for those left out."""
    if count <= 2 * SHOWN + 1:
        return list(range(count))
    return [*range(SHOWN), None, *range(count - SHOWN, count)]


def slices_text(chunk: Chunk) -> str:
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

"""Writes when the calls, copies and updates of a step run: a table of its calls, and a trace for a browser."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from chunkft_fx.bytes import format_bytes
from chunkft_fx.plan.table import plain_table, text
from chunkft_fx.predict.step_clock import COMPUTE, INCOMING, LANES, OUTGOING, UPDATES, Span

BEFORE, BEHIND = "before the first call", "behind the last call"


@dataclass(frozen=True)
class Row:
    """One call of a region: how long compute waits before it, and what the other lanes do in the time of both.

    In microseconds and bytes. What comes and goes before the first call, while the step before ends, has a first row of
    its own; a last one has what goes on when all calls are over, and waits for updates.
    """

    what: str
    begin_us: float
    waits_us: float
    runs_us: float
    updates_us: float
    incoming: int
    outgoing: int


def rows(spans: Sequence[Span]) -> list[Row]:
    """The calls of a step in order. A copy's bytes are shared out among calls by the time that it takes beside each."""
    found, before = [], 0.0
    earliest = min((s.begin_us for s in spans), default=0.0)
    if earliest < 0:
        found.append(Row(BEFORE, earliest, 0.0, 0.0, *_beside(spans, earliest, 0.0)))
    for call in (s for s in spans if s.lane == COMPUTE):
        beside = _beside(spans, before, call.end_us)
        found.append(Row(call.what, call.begin_us, call.begin_us - before, call.end_us - call.begin_us, *beside))
        before = call.end_us
    beside = _beside(spans, before, max(s.end_us for s in spans))
    if any(beside):
        updated = max((s.end_us for s in spans if s.lane == UPDATES), default=0.0)
        found.append(Row(BEHIND, before, max(updated - before, 0.0), 0.0, *beside))
    return found


def _beside(spans: Sequence[Span], begin: float, end: float) -> tuple[float, int, int]:
    """What the other lanes do between two times: microseconds of updates, and bytes that come and go."""
    found = dict.fromkeys(LANES, 0.0)
    for s in spans:
        us = min(s.end_us, end) - max(s.begin_us, begin)
        if us > 0:
            found[s.lane] += us if s.lane == UPDATES else s.nbytes * us / (s.end_us - s.begin_us)
    return found[UPDATES], round(found[INCOMING]), round(found[OUTGOING])


def table(spans: Sequence[Span]) -> str:
    """The rows for people."""
    found = plain_table("call", "begins", "waits", "runs", "updates", INCOMING, OUTGOING)
    for row in rows(spans):
        times = (row.begin_us, row.waits_us, row.runs_us, row.updates_us)
        found.add_row(row.what, *map(_ms, times), *map(_bytes, (row.incoming, row.outgoing)))
    return text(["when calls run, and what is done beside each since the one before it"], found)


def _ms(us: float) -> str:
    return f"{us / 1e3:.2f} ms" if us else ""


def _bytes(nbytes: int) -> str:
    return format_bytes(nbytes) if nbytes else ""


def chrome_trace(spans: Sequence[Span]) -> str:
    """All spans as JSON in the trace event format, which chrome://tracing and ui.perfetto.dev show; a thread a lane."""
    names = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": i, "args": {"name": lane}} for i, lane in enumerate(LANES)
    ]
    done = [
        {
            "ph": "X", "name": s.what, "pid": 0, "tid": LANES.index(s.lane), "ts": s.begin_us,
            "dur": s.end_us - s.begin_us, "args": {"bytes": s.nbytes},
        }
        for s in spans
    ]  # fmt: skip
    return json.dumps({"traceEvents": [*names, *done], "displayTimeUnit": "ms"})

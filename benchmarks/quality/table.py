"""Writes the table of a setting: each row at its best rate, over all seeds that it was trained from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from benchmarks.quality.results import Record, Run
from benchmarks.quality.search import Aim, best_rate, is_settled, loss_of, rates_of
from chunkft_fx.bytes import format_bytes

TITLES = (
    "row",
    "rate",
    "held-out loss",
    "seeds",
    "above dense",
    "step",
    "first step",
    "reserved",
    "chunks",
    "updates of a weight",
)


@dataclass(frozen=True)
class Result:
    """A row's lines at its best rate, one for each seed that came to an end with a finite loss."""

    aim: Aim
    rate: float
    is_settled: bool
    lines: tuple[Record, ...]

    @property
    def losses(self) -> list[float]:
        return [loss_of(line) for line in self.lines]


def result(aimed: Aim, lines: Mapping[Run, Record]) -> Result | None:
    """What is known of a row, if anything."""
    rate = best_rate(aimed, lines)
    if rate is None:
        return None
    runs = [aimed.run(rate, seed) for seed in sorted({run.seed for run in lines})]
    finite = [lines[run] for run in runs if run in lines and loss_of(lines[run]) < float("inf")]
    return Result(aimed, rate, is_settled(aimed, lines) or not aimed.is_extended, tuple(finite))


def table(aims: Sequence[Aim], lines: Mapping[Run, Record]) -> str:
    """Rows as Markdown, and below it what the figures are of and which rows have none."""
    results = [found for aimed in aims if (found := result(aimed, lines)) is not None]
    compared = next((fmean(r.losses) for r in results if r.aim.row == "dense"), None)
    written = ["| " + " | ".join(TITLES) + " |", "| --- " * len(TITLES) + "|"]
    written += ["| " + " | ".join(_cells(r, compared)) + " |" for r in results]
    notes = [_note(aimed, lines) for aimed in aims if result(aimed, lines) is None and rates_of(aimed, lines)]
    return "\n".join([*written, "", *notes, *_origin([line for r in results for line in r.lines])])


def _cells(r: Result, compared: float | None) -> list[str]:
    losses = r.losses
    spread = f" ({min(losses):.4f} to {max(losses):.4f})" if len(losses) > 1 else ""
    above = "" if compared is None or r.aim.row == "dense" else f"{fmean(losses) - compared:+.4f}"
    alone = [line for line in r.lines if line["jobs"] == 1]  # beside others a step's time says nothing
    step = f"{median(line['steady_ms'] for line in alone):.1f} ms" if alone else ""
    first = f"{median(line['first_s'] for line in alone):.1f} s" if alone else ""
    reserved = max(line["reserved"] for line in r.lines)
    chunks = sorted({line["chunks"] for line in r.lines if line["chunks"] is not None})
    return [
        f"`{r.aim.row}`",
        f"{r.rate:g}" + ("" if r.is_settled else ", at an edge"),
        f"{fmean(losses):.4f}{spread}",
        str(len(losses)),
        above,
        step,
        first,
        format_bytes(reserved) if reserved else "",
        " or ".join(map(str, chunks)),
        f"{r.aim.steps / chunks[0]:g}" if chunks else str(r.aim.steps),
    ]


def _note(aimed: Aim, lines: Mapping[Run, Record]) -> str:
    tried = rates_of(aimed, lines)
    failures = sorted({line["failure"] for line in tried.values() if line["failure"]})
    return (
        f"`{aimed.row}` has no finite loss at {', '.join(f'{rate:g}' for rate in tried)}. {' '.join(failures)}".strip()
    )


def _origin(lines: Sequence[Record]) -> list[str]:
    if not lines:
        return []
    said = {
        key: sorted({str(line[key]) for line in lines})
        for key in ("device", "commit", "data", "batch", "length", "parameters")
    }
    before = f"{min(line['before'] for line in lines):.4f}"
    what = "; ".join(f"{key} {', '.join(values)}" for key, values in said.items())
    return [f"Held-out loss before: {before}; {what}."]

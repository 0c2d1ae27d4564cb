"""Decides the runs of a grid of chunks, intervals and rates, and says which of them end above where they began.

Everything but the number of chunks, the interval and the rate is the library's default. A run diverged if its held-out
loss ends above its start, or if it is not finite. Only rates at which dense AdamW did not are held against the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.quality.results import Record, Run
from benchmarks.quality.search import Aim, ladder, loss_of

CHUNKS = (1, 2, 4, 8, 16, 32, 64)
INTERVALS = (1, 2, 5, 20, 50)
RATES = tuple(ladder(rung) for rung in range(-7, -2))  # 3e-4 to 3e-2, where dense AdamW ends below its start on the CPU


def grid_rows() -> list[str]:
    """Dense AdamW, each number of chunks with the default interval, then with each other: one chunk has no turns."""
    pairs = [(n, k) for n in CHUNKS for k in INTERVALS if n > 1]
    return ["dense", *(f"one:chunks={n}" for n in CHUNKS), *(f"one:chunks={n},interval={k}" for n, k in pairs)]


def has_diverged(line: Record) -> bool:
    """Whether a run that was made ended above its start, or with no finite loss."""
    return not line["failure"] and loss_of(line) > line["before"]


def judged(aims: Sequence[Aim], lines: Mapping[Run, Record]) -> tuple[float, ...]:
    """The rates at which dense AdamW was trained and did not diverge."""
    rates = (run.lr for aimed in aims if aimed.row == "dense" for run, line in _runs(aimed, lines) if _is_stable(line))
    return tuple(rates)


def diverged(aims: Sequence[Aim], lines: Mapping[Run, Record]) -> list[Run]:
    """The runs that diverged at a rate at which dense AdamW did not."""
    rates = judged(aims, lines)
    return [run for aimed in aims for run, line in _runs(aimed, lines) if run.lr in rates and has_diverged(line)]


def grid_table(aims: Sequence[Aim], lines: Mapping[Run, Record]) -> str:
    """Held-out losses as Markdown, a column for each rate, and below it what diverged and what is still to be made.

    A loss in bold diverged; one in brackets is the highest on the way of a run that was above its start there.
    """
    rates = sorted({rate for aimed in aims for rate in aimed.rates})
    written = ["| row | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "| --- " * (len(rates) + 1) + "|"]
    for aimed in aims:
        cells = [_cell(lines.get(aimed.run(rate, 0))) for rate in rates]
        written.append(f"| `{aimed.row}` | " + " | ".join(cells) + " |")
    made = [line for aimed in aims for _, line in _runs(aimed, lines)]
    found, stable = diverged(aims, lines), judged(aims, lines)
    defaults = [aimed for aimed in aims if aimed.row.startswith("one") and "interval" not in aimed.row]
    of_defaults = diverged([aimed for aimed in aims if aimed.row == "dense" or aimed in defaults], lines)
    judged_defaults = sum(run.lr in stable for aimed in defaults for run, _ in _runs(aimed, lines))
    begun = sorted({f"{line['before']:.4f}" for line in made if not line["failure"]})
    commits = sorted({line["commit"] for line in made})
    return "\n".join(
        [
            *written,
            "",
            f"Held-out loss before: {', '.join(begun)}; commit {', '.join(commits)}.",
            f"Dense AdamW did not diverge at {', '.join(f'{rate:g}' for rate in stable) or 'any rate that was tried'}; "
            f"{len(found)} other runs did at these rates{': ' if found else '.'}{'; '.join(map(str, found))}",
            f"With the default interval {len(of_defaults)} of {judged_defaults} runs at these rates did.",
            f"{len(made)} of {sum(len(aimed.rates) for aimed in aims)} runs are made.",
        ]
    )


def _runs(aimed: Aim, lines: Mapping[Run, Record]) -> list[tuple[Run, Record]]:
    runs = (aimed.run(rate, 0) for rate in aimed.rates)
    return [(run, lines[run]) for run in runs if run in lines]


def _is_stable(line: Record) -> bool:
    return not line["failure"] and not has_diverged(line)


def _cell(line: Record | None) -> str:
    if line is None:
        return ""
    if line["failure"]:
        return "failed"
    highest = max((loss for _, _, loss in line["curve"] if loss is not None), default=0.0)
    loss = "not finite" if line["loss"] is None else f"{line['loss']:.3f}"
    loss = f"**{loss}**" if has_diverged(line) else loss
    return f"{loss} ({highest:.3f})" if highest > line["before"] else loss

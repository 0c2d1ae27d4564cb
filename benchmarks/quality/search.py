"""Decides which runs the table still needs: rates until the best one has worse neighbours, then other seeds at it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.quality.results import Record, Run
from benchmarks.quality.rows import METHODS, row

MOST_RATES = 7  # that are tried for a row


@dataclass(frozen=True)
class Aim:
    """A row of the table: its rates to begin with, whether others may follow, and from how many seeds it is trained."""

    setting: str
    row: str
    steps: int
    rates: tuple[float, ...]
    is_extended: bool
    seeds: int

    def run(self, lr: float, seed: int) -> Run:
        """A run of this row."""
        return Run(self.setting, self.row, lr, seed, self.steps)


def ladder(rung: int) -> float:
    """..., 1e-3, 3e-3, 1e-2, ...: two rates a decade."""
    return float(f"{(1, 3)[rung % 2]}e{rung // 2}")


def rung_of(rate: float) -> int:
    """The rung whose rate is nearest."""
    return round(2 * math.log10(rate))


def first_rates(text: str) -> tuple[float, ...]:
    """Three rates around the one in the middle of a row's method."""
    middle = rung_of(METHODS[row(text).method].rate)
    return ladder(middle - 1), ladder(middle), ladder(middle + 1)


def aim(setting: str, text: str, steps: int, rates: Sequence[float] | None, seeds: int) -> Aim:
    """The aim of a row: ``steps`` are those of its options if it has any; given rates are all that are tried."""
    chosen = row(text)
    steps = dict(chosen.options).get("steps", steps)
    return Aim(setting, chosen.text, steps, tuple(sorted(rates or first_rates(text))), rates is None, seeds)


def loss_of(record: Record) -> float:
    """The loss to compare: infinite where it was not finite, or where the run failed."""
    loss = record.get("loss")
    return math.inf if loss is None else float(loss)


def rates_of(aimed: Aim, lines: Mapping[Run, Record]) -> dict[float, Record]:
    """The lines of a row's first seed by rate, from the lowest on."""
    fitting = {run.lr: line for run, line in lines.items() if run == aimed.run(run.lr, 0)}
    return dict(sorted(fitting.items()))


def best_rate(aimed: Aim, lines: Mapping[Run, Record]) -> float | None:
    """The rate with the lowest loss, if any run of the first seed came to an end with a finite one."""
    losses = {rate: loss_of(line) for rate, line in rates_of(aimed, lines).items()}
    best = min(losses, key=losses.__getitem__, default=None)
    return None if best is None or losses[best] == math.inf else best


def is_settled(aimed: Aim, lines: Mapping[Run, Record]) -> bool:
    """Whether the best rate has a worse one on both sides."""
    rates = list(rates_of(aimed, lines))
    best = best_rate(aimed, lines)
    return best is not None and best not in (rates[0], rates[-1])


def rates_left(aimed: Aim, lines: Mapping[Run, Record]) -> list[float]:
    """The rates of a row to train at now."""
    tried = rates_of(aimed, lines)
    if left := [rate for rate in aimed.rates if rate not in tried]:
        return left
    if not aimed.is_extended or len(tried) >= MOST_RATES or is_settled(aimed, lines):
        return []
    if all(line["failure"] for line in tried.values()):
        return []
    lowest, highest = rung_of(min(tried)), rung_of(max(tried))
    best = best_rate(aimed, lines)
    return [ladder(lowest - 1 if best in (None, min(tried)) else highest + 1)]


def runs_left(aims: Sequence[Aim], lines: Mapping[Run, Record]) -> list[Run]:
    """The runs that can begin now, those of the rates before those of more seeds, in the order of the rows."""
    rates, seeds = [], []
    for aimed in aims:
        left = [aimed.run(rate, 0) for rate in rates_left(aimed, lines)]
        rates += left
        best = best_rate(aimed, lines)
        if not left and best is not None:
            seeds += [aimed.run(best, seed) for seed in range(1, aimed.seeds)]
    return [run for run in rates + seeds if run not in lines]

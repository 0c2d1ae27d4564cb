"""Timings: measured microseconds of lowered variants, which take the place of the cost model's estimates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from chunkft_fx.rates import elapsed_seconds


@dataclass
class Timings:
    """Measured microseconds by key (of a variant and a direction), which take the place of estimates."""

    measured: dict[Hashable, float] = field(default_factory=dict)

    def record(self, key: Hashable, us: float) -> None:
        """Remember a measurement; a later one of the same key replaces it. Raises `ValueError` if it is no duration."""
        if not (math.isfinite(us) and us >= 0):
            raise ValueError(f"{us} is not a duration in microseconds")
        self.measured[key] = us

    def us(self, key: Hashable, estimate: float) -> float:
        """The measurement of a key if there is one, else the estimate."""
        return self.measured.get(key, estimate)


def time_callable(run: Callable[[list[Any]], Any], make_inputs: Callable[[], list[Any]], device: torch.device) -> float:
    """Microseconds of one call of a lowered variant: the median of three, after one that is not counted.

    ``make_inputs`` gives a fresh list each time, outside of what is timed: the callable may empty it.
    """

    def once() -> float:
        inputs = make_inputs()
        return elapsed_seconds(lambda: run(inputs), device)

    return statistics.median([once() for _ in range(4)][1:]) * 1e6

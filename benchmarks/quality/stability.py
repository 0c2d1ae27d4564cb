"""Computes up to which rate chunks that are trained by turns mend an error that all of them can mend.

    python -m benchmarks.quality.stability --beta1 0.9

The error is the sum of n weights, one in each chunk, and the loss half its square. Each chunk's first moment is that of
Adam, ``m = beta1 m + (1 - beta1) gradient``; second moments stand still, so that a rate is the learning rate times the
loss's curvature as Adam scales it. A chunk takes ``interval`` steps in its turn, and its moment is kept while the
others take theirs, or begins anew with each turn and is then corrected for its bias. Where all chunks take every step
(dense) the error is stable up to a rate of ``2 (1 + beta1) / (n (1 - beta1))``. With an interval of 1 and moments kept
its modes are the roots z of

    (z - 1) (z^n - beta1) + rate (1 - beta1) z^n = 0

which lie in the unit circle up to a rate of 2 whatever ``beta1`` is. On the circle ``rate (1 - beta1)`` is ``(1 - z)
(1 - beta1 / z^n)``, which is real only if the angles of both factors cancel; with c the cosine of that angle it is then
at least ``2 (1 - beta1^2) / (1 + sqrt(1 - (1 - beta1^2) / c^2))``, which is least, ``2 (1 - beta1)``, for c = 1: where
the error changes its sign at every step (z = -1), and n is even. Without a moment, or with one that begins anew at
every step, the one mode is ``1 - rate``, stable up to 2 as well.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

CHUNKS = (2, 4, 8, 16, 32, 64)
INTERVALS = (1, 2, 5, 10, 20, 50)
HIGHEST = 100.0  # the rate at which a search ends
FINENESS = 1.01  # of the rates that are tried, before the place between two of them is looked for
MARGIN = 1e-9  # of what rounding makes of a mode that neither grows nor dies away


def kept(chunks: int, interval: int, beta1: float, rate: float) -> Any:
    """The matrix of one turn where moments are kept: of the error and the chunks' moments, the active one's first."""
    step = np.eye(chunks + 1)
    step[1, :2] = 1 - beta1, beta1
    step[0, :2] = 1 - rate * (1 - beta1), -rate * beta1
    moved = np.eye(chunks + 1)[[0, *range(2, chunks + 1), 1]]  # the next chunk's moment comes first
    return moved @ np.linalg.matrix_power(step, interval)


def restarted(interval: int, beta1: float, rate: float) -> float:
    """What a turn leaves of the error where the moment begins anew with it, corrected for its bias."""
    error, moment = 1.0, 0.0
    for step in range(1, interval + 1):
        moment = beta1 * moment + (1 - beta1) * error
        error -= rate * moment / (1 - beta1**step)
    return error


def growth(chunks: int, interval: int, beta1: float, rate: float, momenta: str) -> float:
    """By which factor the slowest mode of the error grows in a turn; below 1 it dies away."""
    if momenta == "restart":
        return abs(restarted(interval, beta1, rate))
    return float(max(abs(np.linalg.eigvals(kept(chunks, interval, beta1, rate)))))


def threshold(chunks: int, interval: int, beta1: float, momenta: str) -> float:
    """The lowest rate from which on the error does not die away, or `HIGHEST`."""

    def is_stable(rate: float) -> bool:
        return growth(chunks, interval, beta1, rate, momenta) <= 1 + MARGIN

    low = 0.01
    while is_stable(high := low * FINENESS):
        if high > HIGHEST:
            return HIGHEST
        low = high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if is_stable(middle) else (low, middle)
    return high


def dense(chunks: int, beta1: float) -> float:
    """The rate up to which the error is stable where all chunks take every step."""
    return 2 * (1 + beta1) / (chunks * (1 - beta1))


def main() -> None:
    """Print the thresholds, and what a step leaves of the error at a rate of 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beta1", type=float, default=0.9)
    beta1 = parser.parse_args().beta1
    print("| chunks | dense | " + " | ".join(f"interval {k}" for k in INTERVALS) + " | left by a step at rate 1 |")
    print("| --- " * (len(INTERVALS) + 3) + "|")
    for n in CHUNKS:
        found = [f"{threshold(n, k, beta1, 'keep'):.2f}" for k in INTERVALS]
        left = growth(n, 1, beta1, 1.0, "keep")
        print(f"| {n} | {dense(n, beta1):.2f} | " + " | ".join(found) + f" | {left:.3f} |", flush=True)
    found = [f"{threshold(2, k, beta1, 'restart'):.2f}" for k in INTERVALS]
    left = growth(2, 1, beta1, 1.0, "restart")
    print("| any, begun anew | | " + " | ".join(found) + f" | {left:.3f} |")


if __name__ == "__main__":
    main()

"""Draws the table of a setting: held-out loss against tokens, seconds of steps, and reserved bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.quality.table import Result
from chunkft_fx.bytes import format_bytes


def curve(result: Result) -> tuple[list[int], list[int], list[float]]:
    """Steps, tokens and mean losses of the points that all seeds have reached with a finite loss."""
    points = [
        (steps, tokens, fmean(line["curve"][i][2] for line in result.lines))
        for i, (steps, tokens, _) in enumerate(result.lines[0]["curve"])
        if all(line["curve"][i][2] is not None for line in result.lines)
    ]
    steps, tokens, losses = zip(*points, strict=True)
    return list(steps), list(tokens), list(losses)


def plot(results: Sequence[Result], title: str, path: Path) -> None:
    """One figure with three panels; seconds are those of runs that had the device for themselves."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (by_tokens, by_seconds, by_bytes) = pyplot.subplots(1, 3, figsize=(15, 5), sharey=True)
    for i, result in enumerate(results):
        style: dict[str, Any] = {"color": f"C{i % 10}", "marker": "o^sDv"[i // 10 % 5], "markersize": 4}
        steps, tokens, losses = curve(result)
        by_tokens.plot(tokens, losses, label=f"{result.aim.row}, {result.rate:g}", **style)
        if alone := [line["steady_ms"] for line in result.lines if line["jobs"] == 1]:
            by_seconds.plot([step * median(alone) / 1e3 for step in steps], losses, **style)
        if reserved := max(line["reserved"] for line in result.lines):
            by_bytes.plot([reserved], [losses[-1]], linestyle="", **style)
            by_bytes.annotate(format_bytes(reserved), (reserved, losses[-1]), fontsize=6)
    by_tokens.set(xlabel="tokens", ylabel="held-out loss", title=title)
    by_seconds.set(xlabel="seconds of steps")
    by_bytes.set(xlabel="bytes reserved" if by_bytes.lines else "no bytes: not on a GPU")
    figure.set_layout_engine("constrained")
    figure.legend(loc="outside right upper", fontsize=7)
    figure.savefig(path)

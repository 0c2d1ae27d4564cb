"""The plot of the learning table: the curve of a row is the mean over its seeds, where all are finite."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality.plot import curve, plot
from benchmarks.quality.results import Record
from benchmarks.quality.search import aim
from benchmarks.quality.table import Result


def line(losses: list[float | None], **more: object) -> Record:
    points = [[10 * i, 640 * i, loss] for i, loss in enumerate(losses)]
    return {"curve": points, "loss": losses[-1], "steady_ms": 40.0, "jobs": 1, "reserved": 0} | more


RESULTS = [
    Result(aim("cpu", "dense", 20, [1e-3], 2), 1e-3, True, (line([4.0, 3.0, 2.0]), line([4.0, 2.0, 1.0]))),
    Result(aim("cpu", "all", 20, [1e-3], 1), 1e-3, True, (line([4.0, None, 2.5], jobs=6, reserved=3 * 2**30),)),
]


def test_a_curve_is_the_mean_over_seeds() -> None:
    assert curve(RESULTS[0]) == ([0, 10, 20], [0, 640, 1280], [4.0, 2.5, 1.5])
    assert curve(RESULTS[1]) == ([0, 20], [0, 1280], [4.0, 2.5])


def test_a_figure_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(RESULTS, "cpu", tmp_path / "learning.png")
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG")

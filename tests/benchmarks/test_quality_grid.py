"""The grid of chunks, intervals and rates: its runs, what counts as diverged, and what its table says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from benchmarks.bench_quality import aims_of, main, parsed
from benchmarks.quality.grid import CHUNKS, INTERVALS, RATES, diverged, grid_rows, grid_table, judged
from benchmarks.quality.results import Record, Run, append
from benchmarks.quality.rows import METHODS, row
from benchmarks.quality.search import Aim, runs_left
from benchmarks.quality.settings import SETTINGS


def aims(setting: str, *options: str) -> list[Aim]:
    return aims_of(parsed([setting, "--out", "grid.jsonl", "--grid", *options]))


def line(run: Run, *losses: float | None, failure: str = "") -> Record:
    """The line of a run that begins at 2 and has these held-out losses on the way, the last one at the end."""
    fixed: Record = vars(run) | {"failure": failure, "commit": "abc", "data": "d1"}
    if failure:
        return fixed
    curve = [[n, n, loss] for n, loss in enumerate((2.0, *losses))]
    return fixed | {"before": 2.0, "loss": losses[-1], "curve": curve}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_grid_has_every_pair_at_every_rate_once_in_every_setting(setting: str) -> None:
    asked = aims(setting, "--steps", "240")
    runs = runs_left(asked, {})
    assert len(runs) == len(set(runs)) == len(RATES) * (1 + len(CHUNKS) + (len(CHUNKS) - 1) * len(INTERVALS))
    assert {(run.seed, run.steps, run.setting) for run in runs} == {(0, 240, setting)}
    assert {run.lr for run in runs} == set(RATES) == {3e-4, 1e-3, 3e-3, 1e-2, 3e-2}
    options = [dict(row(text).options) for text in grid_rows()[1:]]
    assert all(set(given) <= {"chunks", "interval"} for given in options), "everything else is the default"
    assert {1, 64} <= {given["chunks"] for given in options if "interval" not in given}
    assert {1, 50} <= {given["interval"] for given in options if "interval" in given}
    assert runs_left(asked, {run: line(run, None) for run in runs}) == [], "no rate and no seed follows"


def test_only_rates_at_which_dense_is_stable_are_held_against_the_others() -> None:
    asked = aims("cpu", "--rates", "0.3", "0.1", "0.2", "0.4")[:2]
    dense, one = asked
    ends: list[tuple[Aim, float, Any]] = [
        (dense, 0.1, 2.0), (dense, 0.2, 2.1), (dense, 0.3, None),
        (one, 0.1, 2.01), (one, 0.2, 3.0), (one, 0.3, None), (one, 0.4, 9.0),
    ]  # fmt: skip
    lines = {a.run(rate, 0): line(a.run(rate, 0), loss) for a, rate, loss in ends}
    assert judged(asked, lines) == (0.1,)
    assert diverged(asked, lines) == [one.run(0.1, 0)]
    failed = dense.run(0.1, 0)
    assert diverged(asked, lines | {failed: line(failed, failure="MemoryError: none")}) == []


def test_the_table_tells_ends_above_the_start_from_ways_above_it() -> None:
    asked = aims("cpu", "--rates", "0.1", "0.2", "0.3")[:3]
    dense, first, second = asked
    lines = {dense.run(rate, 0): line(dense.run(rate, 0), 1.9, 1.8) for rate in (0.1, 0.2)}
    lines[first.run(0.1, 0)] = line(first.run(0.1, 0), 2.5, 1.9)
    lines[first.run(0.2, 0)] = line(first.run(0.2, 0), 2.5, 2.25)
    lines[second.run(0.1, 0)] = line(second.run(0.1, 0), 2.5, None)
    lines[second.run(0.2, 0)] = line(second.run(0.2, 0), failure="ChunkCountError: too many")
    assert grid_table(asked, lines).splitlines() == [
        "| row | 0.1 | 0.2 | 0.3 |",
        "| --- | --- | --- | --- |",
        "| `dense` | 1.800 | 1.800 |  |",
        "| `one:chunks=1` | 1.900 (2.500) | **2.250** (2.500) |  |",
        "| `one:chunks=2` | **not finite** (2.500) | failed |  |",
        "",
        "Held-out loss before: 2.0000; commit abc.",
        "Dense AdamW did not diverge at 0.1, 0.2; 2 other runs did at these rates: "
        "cpu one:chunks=1 at 0.2, seed 0; cpu one:chunks=2 at 0.1, seed 0",
        "With the default interval 2 of 4 runs at these rates did.",
        "6 of 9 runs are made.",
    ]


def test_the_command_shows_a_grid_that_is_half_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "grid.jsonl"
    run = aims("cpu")[0].run(1e-3, 0)
    append(out, line(run, 1.5))
    main(["cpu", "--out", str(out), "--grid", "--table"])
    said = capsys.readouterr().out
    assert "| `dense` |  | 1.500 |  |  |  |" in said and "did not diverge at 0.001; 0 other runs" in said
    assert f"1 of {len(RATES) * len(grid_rows())} runs are made." in said
    with pytest.raises(SystemExit):
        main(["cpu", "--out", str(out), "--grid", "--rows", "dense"])
    assert "--grid has rows of its own" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["dense", "one"])
def test_a_beta_may_be_written_as_an_int(method: str) -> None:
    METHODS[method].make(nn.Linear(3, 3), {"beta1": 0, "max_grad_norm": 1.0, "budget": "1GB"})

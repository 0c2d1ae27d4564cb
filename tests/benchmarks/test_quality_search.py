"""Which learning runs are left: rates until the best has worse neighbours, then seeds; rows and what they may say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quality.results import Record, Run
from benchmarks.quality.rows import METHODS, row
from benchmarks.quality.search import (
    MOST_RATES,
    Aim,
    aim,
    best_rate,
    is_settled,
    ladder,
    rates_of,
    rung_of,
    runs_left,
)
from benchmarks.quality.settings import SETTINGS
from benchmarks.quality.table import table


def line(run: Run, loss: float | None, failure: str = "", **more: Any) -> Record:
    fixed: Record = {"jobs": 1, "steady_ms": 40.0, "first_s": 1.5, "reserved": 0, "chunks": None, "before": 3.8}
    fixed |= {"device": "CPU", "commit": "abc", "data": "d1", "batch": 16, "length": 64, "parameters": 221760}
    return fixed | vars(run) | {"loss": loss, "failure": failure} | more


def finished(aims: list[Aim], loss: Any) -> dict[Run, Record]:
    """Make all runs that are left, again and again; ``loss`` of a run is a number, None, or a failure."""
    lines: dict[Run, Record] = {}
    for _ in range(100):
        left = runs_left(aims, lines)
        if not left:
            return lines
        assert not set(left) & set(lines) and len(set(left)) == len(left)
        for run in left:
            came = loss(run)
            lines[run] = line(run, None, came) if isinstance(came, str) else line(run, came)
    raise AssertionError("the search does not end")


def test_rates_are_two_a_decade() -> None:
    assert [ladder(i) for i in range(-8, 1)] == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0]
    assert all(rung_of(ladder(i)) == i for i in range(-20, 20))


@given(st.integers(-16, 4), st.integers(1, 3))
def test_the_search_finds_the_best_rate_or_says_that_it_did_not(best: int, seeds: int) -> None:
    (aimed,) = aims = [aim("cpu", "dense", 480, None, seeds)]
    lines = finished(aims, lambda run: 2.0 + abs(rung_of(run.lr) - best) + 0.1 * run.seed)
    tried = [rung_of(rate) for rate in rates_of(aimed, lines)]
    assert tried == list(range(tried[0], tried[-1] + 1)) and 3 <= len(tried) <= MOST_RATES
    reached = -7 - (MOST_RATES - 3) < best < -5 + (MOST_RATES - 3)
    assert is_settled(aimed, lines) == reached
    if reached:
        assert best_rate(aimed, lines) == ladder(best)
    assert [run.seed for run in lines if run.lr == best_rate(aimed, lines)] == list(range(seeds))


def test_a_rate_that_diverges_is_worse_than_all_others() -> None:
    (aimed,) = aims = [aim("cpu", "dense", 480, None, 1)]
    lines = finished(aims, lambda run: None if run.lr > 2e-4 else abs(rung_of(run.lr) - rung_of(3e-5)))
    assert best_rate(aimed, lines) == 3e-5 and is_settled(aimed, lines)
    assert list(rates_of(aimed, lines)) == [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
    assert best_rate(aimed, finished(aims, lambda run: None)) is None


def test_a_row_that_always_fails_is_left_after_its_first_rates() -> None:
    aims = [aim("cpu", text, 480, None, 3) for text in ("one:chunks=0", "dense")]
    lines = finished(aims, lambda run: "ChunkCountError: 0 chunks" if run.row != "dense" else abs(run.lr - 1e-3))
    assert [run.lr for run in lines if run.row != "dense"] == [3e-4, 1e-3, 3e-3]
    assert best_rate(aims[0], lines) is None
    assert "`one:chunks=0` has no finite loss at 0.0003, 0.001, 0.003. ChunkCountError: 0 chunks" in table(aims, lines)


def test_given_rates_are_all_that_is_tried() -> None:
    aims = [aim("cpu", "dense", 480, [1e-3, 5e-4], 2)]
    lines = finished(aims, lambda run: run.lr)
    assert {(run.lr, run.seed) for run in lines} == {(1e-3, 0), (5e-4, 0), (5e-4, 1)}
    assert "at an edge" not in table(aims, lines)


def test_rates_of_all_rows_come_before_seeds() -> None:
    aims = [aim("cpu", text, 480, [1e-3], 2) for text in ("dense", "all")]
    dense = Run("cpu", "dense", 1e-3, 0, 480)
    assert [(r.row, r.seed) for r in runs_left(aims, {dense: line(dense, 1.0)})] == [("all", 0), ("dense", 1)]


def test_a_row_of_another_length_is_another_run() -> None:
    assert aim("cpu", "dense:steps=60", 480, None, 1).steps == 60
    assert aim("cpu", "dense", 480, None, 1).run(1e-3, 0) != aim("cpu", "dense", 240, None, 1).run(1e-3, 0)


def test_a_row_is_the_same_however_it_is_written() -> None:
    assert row("one:chunks=8,beta1=0").text == row("one:beta1=0,chunks=8").text == "one:beta1=0,chunks=8"
    assert dict(row("all:update=backward,max_grad_norm=null").options) == {"update": "backward", "max_grad_norm": None}
    assert row(row("lora:dora=true,rank=full").text) == row("lora:rank=full,dora=true")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparse", "method 'sparse' is not known; choose one of dense, all, one"),
        ("dense:chunks=8", "'chunks=8' is no option of dense; it has beta1, beta2, max_grad_norm, steps"),
        ("one:chunks", "'chunks' is no option of one"),
        ("one:coverage=all", "'coverage=all' is no option of one"),
    ],
)
def test_a_row_that_is_not_known_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row(text)


@pytest.mark.parametrize("name", SETTINGS)
def test_all_rows_of_a_setting_are_rows_and_differ(name: str) -> None:
    setting = SETTINGS[name]
    texts = [row(text).text for text in setting.rows_at(setting.steps)]
    assert len(set(texts)) == len(texts) and setting.compared <= len(texts)
    assert texts[0] == "dense"


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    needed = {name: row(name).missing for name in METHODS}
    assert needed["dense"] is needed["all"] is needed["one"] is None
    assert (needed["lomo"], needed["lora"], needed["galore"]) == ("lomo-optim", "peft", "galore-torch")


def test_the_table_has_means_and_spreads_and_no_seconds_of_runs_side_by_side() -> None:
    aims = [aim("cpu", text, 480, [1e-3], 3) for text in ("dense", "one:chunks=8")]
    losses = {"dense": (2.0, 2.1, 2.2), "one:chunks=8": (2.6, 2.5, 2.4)}
    runs = [a.run(1e-3, seed) for a in aims for seed in range(3)]
    lines = {run: line(run, losses[run.row][run.seed]) for run in runs}
    for run in runs[3:]:
        lines[run] |= {"jobs": 6, "chunks": 8, "reserved": 3 * 2**30}
    _, _, dense, one, *rest = table(aims, lines).splitlines()
    assert dense == "| `dense` | 0.001 | 2.1000 (2.0000 to 2.2000) | 3 |  | 40.0 ms | 1.5 s |  |  | 480 |"
    assert one == "| `one:chunks=8` | 0.001 | 2.5000 (2.4000 to 2.6000) | 3 | +0.4000 |  |  | 3.0 GiB | 8 | 60 |"
    assert rest[-1].startswith("Held-out loss before: 3.8000; device CPU; commit abc; data d1")

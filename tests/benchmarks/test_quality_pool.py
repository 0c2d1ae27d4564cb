"""Learning runs side by side: each is made once, whoever was killed; failures have lines; none begins too late."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.quality.results import Record, read
from tests.support.quality_pool import pool

HOUR = 60.0


def lines(folder: Path) -> list[Record]:
    return read(folder / "runs.jsonl")


def begun(folder: Path) -> list[Record]:
    return read(folder / "told")


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def command(folder: Path, *rows: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "tests.support.quality_pool", str(folder), "2", "60", *rows])


def test_runs_that_have_lines_are_skipped_and_those_that_failed_too(tmp_path: Path) -> None:
    pool(tmp_path, 1, HOUR, "dense", "lora")
    assert [(line["row"], line["lr"], line["failure"]) for line in lines(tmp_path)] == [
        ("dense", 1e-3, ""),
        ("dense", 3e-3, ""),
        ("lora", 1e-3, "ValueError: no"),
        ("lora", 3e-3, "ValueError: no"),
    ]
    pool(tmp_path, 1, HOUR, "dense", "lora")
    assert len(lines(tmp_path)) == len(begun(tmp_path)) == 4


def test_a_run_whose_process_dies_has_a_line_that_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool(tmp_path, 2, HOUR, "lomo", "dense")
    failures = {(line["row"], line["lr"]): line["failure"] for line in lines(tmp_path)}
    assert len(failures) == 4
    assert failures["lomo", 1e-3].startswith("its process ended with status -9; its output is in ")
    assert failures["dense", 1e-3] == ""
    assert "cpu lomo at 0.001, seed 0: its process ended" in capsys.readouterr().out


def test_as_many_run_side_by_side_as_there_are_jobs(tmp_path: Path) -> None:
    running = command(tmp_path, "badam", "dense")
    wait_for(lambda: len(begun(tmp_path)) == 2)
    time.sleep(0.5)
    assert {line["run"] for line in begun(tmp_path)} == {"cpu badam at 0.001, seed 0", "cpu badam at 0.003, seed 0"}
    (tmp_path / "go").touch()
    assert running.wait(60) == 0
    assert len(lines(tmp_path)) == 4


def test_none_begins_when_the_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool(tmp_path, 1, 0.0, "dense")
    assert not lines(tmp_path)
    assert "still to be made: cpu dense at 0.001, seed 0, and 1 others or more" in capsys.readouterr().out


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_what_was_interrupted_is_made_again_and_nothing_else(tmp_path: Path, how: signal.Signals) -> None:
    running = command(tmp_path, "dense", "badam")
    wait_for(lambda: len(lines(tmp_path)) == 2 and len(begun(tmp_path)) == 4)
    running.send_signal(how)
    running.wait(60)
    waiting = [line["pid"] for line in begun(tmp_path)[2:]]
    if how == signal.SIGKILL:  # its children live on, with their claims
        for child in waiting:
            os.kill(child, signal.SIGKILL)
    assert len(lines(tmp_path)) == 2
    (tmp_path / "go").touch()
    pool(tmp_path, 2, HOUR, "dense", "badam")
    assert sorted((line["row"], line["lr"]) for line in lines(tmp_path)) == [
        ("badam", 1e-3),
        ("badam", 3e-3),
        ("dense", 1e-3),
        ("dense", 3e-3),
    ]
    assert len(begun(tmp_path)) == 6


def test_commands_that_share_a_file_make_each_run_once(tmp_path: Path) -> None:
    rows = ("badam", "dense", "lora", "lomo")
    both = [command(tmp_path, *rows), command(tmp_path, *rows)]
    wait_for(lambda: len(begun(tmp_path)) >= 4)
    (tmp_path / "go").touch()
    assert [running.wait(60) for running in both] == [0, 0]
    assert len(lines(tmp_path)) == len(begun(tmp_path)) == len({line["run"] for line in begun(tmp_path)}) == 8

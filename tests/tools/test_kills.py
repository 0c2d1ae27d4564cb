"""A run killed at any moment, also while it saves, goes on to the very bits of one that was never stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support.killed_run import MODES, STEPS

KILLED = -signal.SIGKILL


class Runs:
    """The program that forks runs."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.support.killed_run"]
        environment = {name: value for name, value in os.environ.items() if name != "CHUNKFT_VERIFY"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(
        self, out: Path, fuse: int = 0, kill_after: int = 0, delay: float = 0.0, mode: str = "chunks"
    ) -> tuple[int, int]:
        """Run to the end or to the death; gives the exit status and the last step that was seen.

        ``mode`` is a key of `MODES`, ``kill_after`` is a step, ``delay`` the seconds from then to the kill.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"out": str(out), "fuse": fuse, "mode": mode}), file=self.process.stdin, flush=True)
        pid = step = 0
        for line in self.process.stdout:
            what, value = line.split(maxsplit=1)
            assert what != "failed", value
            if what == "start":
                pid = int(value)
            if what == "step":
                step = int(value)
                if step == kill_after:
                    time.sleep(delay)
                    os.kill(pid, signal.SIGKILL)
            if what == "end":
                return int(value), step
        raise AssertionError("the program that forks runs has ended")


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    runs = Runs()
    with runs.process:
        yield runs
        runs.process.kill()


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights of a run that was never stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert runs.run(out) == (0, STEPS)
    return load_file(out / "model.safetensors")


def assert_equal(out: Path, whole: dict[str, Tensor]) -> None:
    found = load_file(out / "model.safetensors")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_a_run_killed_between_steps_and_while_saving_equals_one_that_never_stopped(
    runs: Runs, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    status, _ = runs.run(tmp_path, kill_after=3)
    assert status == KILLED
    # of its second checkpoint the file is on the disk, but does not have its name yet
    status, _ = runs.run(tmp_path, fuse=5)
    assert status == KILLED
    assert (tmp_path / "checkpoint.pt.unfinished").exists()
    assert runs.run(tmp_path)[0] == 0
    assert_equal(tmp_path, whole)


@pytest.mark.parametrize(
    "mode",
    [pytest.param(m, marks=() if m == "remainder" else pytest.mark.slow) for m in MODES if m != "chunks"],
)
def test_a_run_with_full_coverage_killed_between_steps_and_while_saving(runs: Runs, tmp_path: Path, mode: str) -> None:
    never_stopped, killed = tmp_path / "whole", tmp_path / "killed"
    assert runs.run(never_stopped, mode=mode) == (0, STEPS)
    assert runs.run(killed, kill_after=3, mode=mode)[0] == KILLED
    assert runs.run(killed, fuse=5, mode=mode)[0] == KILLED
    for delay in (0.0, 0.03):  # at any moment of a forward, a backward with its updates, or a step
        again = tmp_path / str(delay)
        shutil.copytree(killed, again)
        assert runs.run(again, kill_after=5, delay=delay, mode=mode)[0] == KILLED
        assert runs.run(again, mode=mode)[0] == 0
        assert_equal(again, load_file(never_stopped / "model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_at_random_moments_equals_one_that_never_stopped(
    runs: Runs, whole: dict[str, Tensor], tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    for _ in range(3):
        if draw.random() < 0.5:
            runs.run(tmp_path, kill_after=draw.randint(1, STEPS), delay=draw.random() * 0.2)
        else:
            runs.run(tmp_path, fuse=draw.randint(1, 20))
    assert runs.run(tmp_path)[0] == 0
    assert_equal(tmp_path, whole)


@pytest.mark.slow
def test_a_run_killed_at_each_moment_of_its_last_save_can_be_finished(
    runs: Runs, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    assert runs.run(tmp_path, fuse=13)[0] == KILLED  # three calls for each of four checkpoints, then the model
    fuse = 1
    while True:
        status, step = runs.run(tmp_path, fuse=fuse)
        assert step == 0
        if status == 0:
            break
        assert status == KILLED
        fuse += 1
    assert fuse > 4
    assert_equal(tmp_path, whole)

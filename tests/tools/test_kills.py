"""A run killed at any moment, also while it saves, goes on to the very bits of one that was never stopped."""

from __future__ import annotations

import json
import os
import random
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

from tests.support.killed_run import STEPS

KILLED = -signal.SIGKILL


class Runs:
    """The program that forks runs."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.support.killed_run"]
        environment = {name: value for name, value in os.environ.items() if name != "CHUNKFT_VERIFY"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, out: Path, fuse: int = 0, kill_after: int = 0, delay: float = 0.0) -> tuple[int, int]:
        """Run to the end or to the death; gives the exit status and the last step that was seen.

        ``kill_after`` is a step, ``delay`` the seconds from then to the kill.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"out": str(out), "fuse": fuse}), file=self.process.stdin, flush=True)
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

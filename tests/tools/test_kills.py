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
from transformers import AutoModelForCausalLM, AutoTokenizer

from chunkft_fx.checkpoints.disk.folders import checkpoints
from chunkft_fx.checkpoints.load import read
from tests.support.killed_run import MODES, STEPS
from tests.support.tiny_text import character_tokenizer

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


def assert_whole(out: Path) -> int:
    """Every checkpoint in a folder is whole, and a model and a tokenizer for transformers; gives how many there are."""
    found = checkpoints(out)
    for path in found:
        read(path)
        model = AutoModelForCausalLM.from_pretrained(path)
        assert all(p.isfinite().all() for p in model.parameters())
        assert len(AutoTokenizer.from_pretrained(path)) == len(character_tokenizer())
    return len(found)


def test_a_run_killed_between_steps_and_while_saving_equals_one_that_never_stopped(
    runs: Runs, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    assert runs.run(tmp_path, kill_after=3)[0] == KILLED
    before = assert_whole(tmp_path)
    # in the middle of what it writes of a checkpoint
    assert runs.run(tmp_path, fuse=30)[0] == KILLED
    assert list(tmp_path.glob("checkpoint-*.unfinished"))
    assert assert_whole(tmp_path) >= before
    assert runs.run(tmp_path)[0] == 0
    assert_equal(tmp_path, whole)
    assert assert_whole(tmp_path) == 2
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize(
    "mode",
    [pytest.param(m, marks=() if m == "remainder" else pytest.mark.slow) for m in MODES if m != "chunks"],
)
def test_a_run_with_full_coverage_killed_between_steps_and_while_saving(runs: Runs, tmp_path: Path, mode: str) -> None:
    never_stopped, killed = tmp_path / "whole", tmp_path / "killed"
    assert runs.run(never_stopped, mode=mode) == (0, STEPS)
    assert runs.run(killed, kill_after=3, mode=mode)[0] == KILLED
    assert runs.run(killed, fuse=30, mode=mode)[0] == KILLED
    for delay in (0.0, 0.03):  # at any moment of a forward, a backward with its updates, or a step
        again = tmp_path / str(delay)
        shutil.copytree(killed, again)
        assert runs.run(again, kill_after=5, delay=delay, mode=mode)[0] == KILLED
        assert assert_whole(again) > 0
        assert runs.run(again, mode=mode)[0] == 0
        assert_equal(again, load_file(never_stopped / "model.safetensors"))


@pytest.mark.slow
def test_a_run_killed_thirty_times_at_random_moments_equals_one_that_never_stopped(
    runs: Runs, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    draw = random.Random(0)
    kills, finished = 0, 0
    while kills < 30 or not finished:
        out = tmp_path / str(finished)
        # half of them between steps, a third anywhere in what is written
        if draw.random() < 0.6:
            status, _ = runs.run(out, kill_after=draw.randint(1, STEPS), delay=draw.random() * 0.2)
        else:
            status, _ = runs.run(out, fuse=draw.randint(1, 250))
        kills += status == KILLED
        assert_whole(out)
        if status == 0:
            assert_equal(out, whole)
            finished += 1


@pytest.mark.slow
def test_a_run_killed_at_each_moment_of_its_last_save_can_be_finished(
    runs: Runs, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    """Behind the last step: its checkpoint, the removal of an older one, then the model."""
    assert runs.run(tmp_path, kill_after=STEPS - 1)[0] == KILLED
    fuse, status = 1, KILLED
    while status == KILLED:
        out = tmp_path.with_name(f"{tmp_path.name}-{fuse}")
        shutil.copytree(tmp_path, out)
        status, _ = runs.run(out, fuse=fuse)
        assert assert_whole(out) in (1, 2)
        assert runs.run(out)[0] == 0
        assert_equal(out, whole)
        shutil.rmtree(out)
        fuse += 13
    assert fuse > 50

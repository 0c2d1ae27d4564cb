"""SIGINT, SIGTERM and SIGHUP on the command line: saved, said, and the exit code that shells expect."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chunkft_fx.tools import console
from chunkft_fx.tools.setup import job
from chunkft_fx.tools.training import signals
from chunkft_fx.tools.training.checkpoint import require_checkpoint
from chunkft_fx.tools.training.loop import StepInfo
from tests.support.tiny_text import tiny_folder
from tests.tools.test_tools import EAGER, TEXT, chunkft

RUN = ["--steps", "3", "--seq-len", "16", "--batch-size", "2", "--lr", "0.01"]


@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """Signals do what they do in a shell, also where tests run in the background, with some of them ignored."""
    usual: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A run on the command line, all but its output."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    return ["train", str(tiny_folder(tmp_path / "model")), str(text), *EAGER, *RUN]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], Any]) -> None:
    """Act after a step of the run, where its progress is shown."""

    @contextlib.contextmanager
    def progress(title: str, steps: int) -> Iterator[Callable[[StepInfo], None]]:
        yield lambda info: act() if info.step == step else None

    monkeypatch.setattr(job, "progress", progress)


def test_a_run_that_is_told_to_stop_saves_and_can_be_continued_to_the_bit(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    chunkft(*arguments, "--out", str(whole), "--chunks", "3")
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        at_step(patched, 2, lambda: signal.raise_signal(signal.SIGTERM))
        chunkft(*arguments, "--out", str(stopped), "--chunks", "3")
    assert ended.value.code == 128 + signal.SIGTERM
    said = capsys.readouterr().err.splitlines()[-1]
    saved = stopped / "checkpoint-2"
    assert said == f"stopped by SIGTERM after step 2 of 3, saved in {saved}; go on with --resume {stopped}"
    assert not (stopped / "model.safetensors").exists()
    chunkft(*arguments, "--out", str(stopped), "--chunks", "3", "--resume", str(stopped))
    expected, found = (load_file(out / "model.safetensors") for out in (whole, stopped))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_signal_in_the_last_step_lets_the_run_finish(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    chunkft(*arguments, "--out", str(tmp_path / "out"), "--chunks", "3")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_killed_in_its_last_save_is_finished_also_when_chunks_are_chosen(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    chunks = ["--out", str(out), "--chunks", "auto", "--save-every", "2"]

    def killed(*_: Any) -> None:
        raise SystemExit(1)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(job, "save_model", killed)
        chunkft(*arguments, *chunks)
    saved = require_checkpoint(out)
    assert saved.name == "checkpoint-3"
    chunkft(*arguments, *chunks, "--resume", str(out))
    expected, found = (load_file(folder / "model.safetensors") for folder in (saved, out))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_before_training_a_signal_ends_the_program_in_one_line(
    capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    def program() -> None:
        with contextlib.suppress(Exception):  # as libraries have it
            signal.raise_signal(number)

    with pytest.raises(SystemExit) as ended:
        console.run_app(program)
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err == f"stopped by {number.name} before there was anything to save\n"


STUBBORN = """
import signal, time
from chunkft_fx.tools.training.signals import between_steps
with between_steps() as stop:
    print("ready", flush=True)
    while True:
        if stop() is not None:
            print("noted", stop(), flush=True)
        time.sleep(0.01)
"""


def test_a_second_signal_ends_the_program_at_once() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == f"noted {int(signal.SIGINT)}\n"
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        assert process.wait(10) == -signal.SIGTERM
        assert process.stderr.read().startswith("SIGINT: finishing this step")


def test_a_signal_that_was_to_be_ignored_stays_so() -> None:
    """``nohup chunkft train ...`` outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.between_steps() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop() is None
            signal.raise_signal(signal.SIGTERM)
            assert stop() == signal.SIGTERM
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_of_the_main_thread_signals_are_left_alone() -> None:
    found: list[int | None] = []

    def work() -> None:
        with signals.between_steps() as stop:
            found.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "/x"), "error: [Errno 13] Permission denied: '/x'"),
        (torch.OutOfMemoryError("no memory\nfor this"), "error: out of memory: no memory for this"),
        (MemoryError("too much"), "error: out of memory: too much"),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    capsys: pytest.CaptureFixture[str], error: Exception, message: str
) -> None:
    def program() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        console.run_app(program)
    assert ended.value.code == 1
    assert capsys.readouterr().err == message + "\n"

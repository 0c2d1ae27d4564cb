"""The file of learning runs: what is written is read, beside other writers and behind killed ones; claims end too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.quality.results import Run, append, claim, latest, read

RUN = Run("cpu", "dense", 3e-3, 0, 480)
LINE = {"setting": "cpu", "row": "dense", "lr": 3e-3, "seed": 0, "steps": 480}


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    assert read(path) == []
    append(path, LINE | {"loss": None})
    append(path, LINE | {"loss": 1.5})
    assert latest(read(path)) == {RUN: LINE | {"loss": 1.5}}


def test_processes_that_append_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    code = (
        "import sys; from pathlib import Path; from benchmarks.quality.results import append\n"
        "for i in range(40): append(Path(sys.argv[1]), {'who': sys.argv[2], 'i': i, 'long': 'x' * 5000})"
    )
    writers = [python(code, str(path), who) for who in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    for writer in writers:
        writer.communicate()
    for who in "abc":
        assert [line["i"] for line in read(path) if line["who"] == who] == list(range(40))


@pytest.mark.parametrize("left", ['{"setting": "cp', "x" * 9000, '{"loss": 1.0}'])
def test_what_a_killed_writer_left_is_no_line_and_the_next_one_cuts_it_off(tmp_path: Path, left: str) -> None:
    path = tmp_path / "runs.jsonl"
    append(path, LINE)
    with open(path, "a") as file:
        file.write(left)
    assert read(path) == [LINE]
    append(path, LINE | {"seed": 1})
    assert read(path) == [LINE, LINE | {"seed": 1}]


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(LINE) + "\n<<<<<<< HEAD\n")
    with pytest.raises(ValueError, match=r"line 2 of .*runs\.jsonl is no JSON"):
        read(path)


def test_losses_that_are_not_finite_are_written_as_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        append(tmp_path / "runs.jsonl", LINE | {"loss": float("nan")})


def test_a_run_is_claimed_once_and_again_when_its_process_was_killed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from benchmarks.quality.results import Run, claim\n"
        "print(claim(Path(sys.argv[1]), Run('cpu', 'dense', 3e-3, 0, 480)) is not None, flush=True); sys.stdin.read()"
    )
    other = python(code, str(tmp_path))
    assert other.stdout is not None and other.stdout.readline() == "True\n"
    assert claim(tmp_path, RUN) is None
    another = claim(tmp_path, Run("cpu", "dense", 3e-3, 1, 480))
    assert another is not None
    other.kill()
    other.communicate()
    mine = claim(tmp_path, RUN)
    assert mine is not None
    for descriptor in (mine, another):
        os.close(descriptor)

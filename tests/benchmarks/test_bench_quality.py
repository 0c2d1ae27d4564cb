"""The command of the learning benchmark: byte-level runs, their lines, and what is refused before any."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import bench_quality
from benchmarks.bench_quality import check_data, installed, main
from benchmarks.quality.results import append, read
from benchmarks.quality.search import aim
from benchmarks.quality.small import NARROW, random_model

ROWS = ("--rows", "dense", "one:chunks=2", "one:chunks=1000000", "--rates", "1e-3", "--seeds", "1", "--steps", "2")


def command(folder: Path, *options: str) -> None:
    main(["cpu", "--out", str(folder / "runs.jsonl"), *options])


def test_runs_have_lines_failures_too_and_both_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "runs.jsonl.work"
    work.mkdir()
    torch.save(random_model(NARROW).state_dict(), work / "base.pt")
    command(tmp_path, *ROWS)
    lines = read(tmp_path / "runs.jsonl")
    assert [(line["row"], line["seed"]) for line in lines] == [
        ("dense", 0),
        ("one:chunks=2", 0),
        ("one:chunks=1000000", 0),
    ]
    dense, one, failed = lines
    assert dense["before"] == pytest.approx(one["before"], rel=1e-5) and dense["loss"] < dense["before"]
    assert [point[:2] for point in dense["curve"]] == [[0, 0], [1, 1024], [2, 2048]]
    assert (dense["chunks"], one["chunks"], dense["parameters"]) == (None, 2, one["parameters"])
    assert all(line["steady_ms"] > 0 and line["first_s"] > 0 and line["total_s"] > 0 for line in (dense, one))
    assert failed["failure"].startswith("ChunkCountError: ") and "loss" not in failed
    assert f"cpu one:chunks=1000000 at 0.001, seed 0: {failed['failure']}" in capsys.readouterr().out
    command(tmp_path, *ROWS, "--jobs", "2")
    assert read(tmp_path / "runs.jsonl") == lines
    said = capsys.readouterr().out
    assert "| `one:chunks=2` | 0.001 | " in said and "`one:chunks=1000000` has no finite loss at 0.001. Chunk" in said
    command(tmp_path, *ROWS, "--retry")
    again = read(tmp_path / "runs.jsonl")[len(lines) :]
    assert [line["row"] for line in again] == ["one:chunks=1000000"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["german"], "setting german trains a model that exists: give --model"),
        (["german", "--model", "m"], "setting german has no text of its own: give --data"),
        (["random"], "setting random has no text of its own: give --data"),
        (["cpu", "--rows", "one:chunk=2"], "'chunk=2' is no option of one"),
    ],
)
def test_what_cannot_be_run_is_said_before_any_run(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main([*options, "--out", str(tmp_path / "runs.jsonl")])
    assert not list(tmp_path.iterdir())


def test_figures_of_another_text_are_not_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "runs.jsonl"
    append(out, {"setting": "cpu", "data": "one"})
    append(out, {"setting": "docs", "data": "two"})
    append(out, {"setting": "cpu", "failure": "before its text was read"})
    check_data(read(out), "cpu", "one", out)
    with pytest.raises(ValueError, match="has figures of docs on another text"):
        check_data(read(out), "docs", "one", out)


def test_rows_without_their_package_are_left_out_and_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    aims = [aim("cpu", text, 480, None, 1) for text in ("dense", "lora", "lora:rank=64")]
    assert installed(aims) == aims[:1]
    assert capsys.readouterr().out == "peft is not installed (pip install peft): no lora, lora:rank=64\n"


def test_the_commit_says_when_files_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_quality.commit().rstrip("+").isalnum()
    monkeypatch.setenv("PATH", "")
    assert bench_quality.commit() == "unknown"

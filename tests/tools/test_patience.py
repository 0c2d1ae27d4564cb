"""A run that ends early: behind scores that are no better, and at the same step after it was killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chunkft_fx.tools.models.evaluate import Score
from chunkft_fx.tools.report.best import Best
from tests.support.tiny_text import character_tokenizer, tiny_folder
from tests.tools.test_tools import EAGER, chunkft
from tests.tools.test_train import logged


@pytest.mark.parametrize(
    ("losses", "patience", "ended"),
    [([3, 2, 2, 2, 1], 2, 4), ([3, 2, 4, 1, 5], 2, None), ([3, 4, 4, 4], 3, 4), ([3, 4, 4, 4], 0, None)],
)
def test_patience_counts_scores_behind_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[float], patience: int, ended: int | None
) -> None:
    monkeypatch.setattr("chunkft_fx.tools.report.best.save_model", lambda *_: None)
    best = Best(tmp_path, None, character_tokenizer())
    found = []
    for i, loss in enumerate(losses, start=1):
        best.offer(10 * i, Score(loss))
        found.append(best.is_enough(10 * i, 10, patience))
        assert best.is_enough(10 * i + 9, 10, patience) == found[-1], "nothing is known between scores"
    assert (found.index(True) + 1 if True in found else None) == ended


def test_a_run_that_goes_on_from_elsewhere_counts_from_there(tmp_path: Path) -> None:
    best = Best(tmp_path, None, character_tokenizer())
    best.resume(100)
    assert [best.is_enough(step, 10, 2) for step in (100, 110, 120)] == [False, False, True]


def test_a_dry_run_says_how_often_is_scored_and_when_it_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = tiny_folder(tmp_path / "model"), tmp_path / "a.txt"
    data.write_text("abcdefgh" * 40)
    arguments = ["train", str(folder), str(data), *EAGER, "--seq-len", "32", "--out", str(tmp_path), "--dry-run"]
    chunkft(*arguments, "--eval-split", "0.2", "--eval-every", "0.25", "--steps", "8", "--patience", "3")
    assert "scored every 2 steps, and ended behind 3 that are no better" in capsys.readouterr().out


def test_a_run_ends_early_also_when_it_is_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, data, other = tiny_folder(tmp_path / "model"), tmp_path / "a.txt", tmp_path / "b.txt"
    data.write_text("abcdefgh" * 40)
    other.write_text("zyxwvuts" * 10)  # gets worse while the other is learned
    arguments = [
        "train", str(folder), str(data), *EAGER, "--seq-len", "32", "--lr", "0.03", "--coverage", "all",
        "--schedule", "constant", "--eval", str(other), "--eval-every", "2", "--patience", "2", "--save-every", "3",
    ]  # fmt: skip
    whole, twice = tmp_path / "whole", tmp_path / "twice"
    chunkft(*arguments, "--out", str(whole), "--steps", "40")
    printed = capsys.readouterr().out
    scores = {line["step"]: line["eval_loss"] for line in logged(whole) if "eval_loss" in line}
    last = max(scores)
    assert last < 40 and min(scores, key=lambda step: scores[step]) == last - 4
    assert f"ended after step {last}: no score was better than that of step {last - 4} since" in printed
    assert (whole / f"checkpoint-{last}").is_dir()
    chunkft(*arguments, "--out", str(twice), "--steps", "3")
    chunkft(*arguments, "--out", str(twice), "--steps", "40")
    expected, found = (load_file(out / "model.safetensors") for out in (whole, twice))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    capsys.readouterr()
    chunkft(*arguments, "--out", str(whole), "--steps", "40")
    assert f"ended after step {last}" in capsys.readouterr().out
    assert max(line["step"] for line in logged(whole)) == last, "nothing was trained behind the end"

"""What a newcomer gets wrong, each with what is said of it: nothing is silent, and nothing is a reason of a library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from chunkft_fx.errors import ChunkFTWarning, DataError
from chunkft_fx.tools.data.formats import document
from tests.support.tiny_text import tiny_folder
from tests.tools.test_load import no_weights
from tests.tools.test_tools import EAGER, chunkft

SHORT = ["--seq-len", "48", "--chat-template", "zephyr", "--steps", "1"]
GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def lines(path: Path, *entries: object) -> Path:
    path.write_text("\n".join(map(json.dumps, entries)))
    return path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--epochs", "0"], "epochs is 0.0; it must be a number above 0"),
        (["--epochs", "-1"], "epochs is -1.0"),
        (["--epochs", "nan"], "epochs is nan"),
        (["--eval-every", "5"], "eval-every is 5, but nothing is held out to score on; give --eval or --eval-split"),
        (["--patience", "2"], "patience is 2, but nothing is held out"),
        (["--patience", "-1", "--eval-split", "0.1"], "patience is -1; it must be 0 or more"),
    ],
)
def test_options_without_effect_or_sense_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        chunkft("train", "no/model", str(tmp_path / "no.txt"), "--out", str(tmp_path), *EAGER, *given)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "q" * 300, "completion": "a"}, "holds nothing to learn within the first 48 tokens of any document"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no turn of the assistant to learn (its roles are user)"),
        (
            {"messages": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]},
            "no turn of the assistant to learn (its roles are human, gpt)",
        ),
        (
            {"messages": [{"speaker": "a", "text": "b"}]},
            'turn 1 of "messages" has the fields speaker, text, and no role',
        ),
        ({"messages": [{"role": "user", "content": None}]}, 'turn 1 of "messages", of role user, has no content'),
        ({"text": ""}, "holds no text to learn; give a file with text to train on"),
    ],
)
def test_data_that_teaches_nothing_says_why(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    record: dict[str, object],
    message: str,
) -> None:
    folder, data = tiny_folder(tmp_path / "model"), lines(tmp_path / "data.jsonl", record)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", no_weights)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        chunkft("train", str(folder), str(data), "--out", str(tmp_path / "out"), *EAGER, *SHORT)
    complaint = capsys.readouterr().err
    assert message in complaint and complaint.count("\n") == 1


def test_turns_of_sharegpt_are_read_under_the_name_of_chats() -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert document("here", {"messages": turns}) == document("here", GOOD)
    with pytest.raises(DataError, match="a turn is from 'nobody'"):
        document("here", {"messages": [{"from": "nobody", "value": "a"}]})


def test_a_folder_without_a_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        chunkft("chat", str(tmp_path))
    assert ended.value.code == 2
    assert f"the folder {tmp_path} holds no model: there is no config.json in it\n" in capsys.readouterr().err


def test_an_unfinished_run_its_model_and_a_finished_one_are_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data, out = tiny_folder(tmp_path / "model"), lines(tmp_path / "data.jsonl", *[GOOD] * 9), tmp_path / "out"
    arguments = ["train", str(folder), str(data), "--out", str(out), *EAGER, *SHORT]
    chunkft(*arguments, "--save-every", "1")
    chunkft(*arguments)
    assert "all 1 steps were done before: nothing was trained" in capsys.readouterr().out
    with pytest.warns(ChunkFTWarning, match="holds a model, which this run replaces when it ends"):
        chunkft(*arguments, "--resume", "never")
    (out / "config.json").unlink()  # as it is before a run has ended
    with pytest.raises(SystemExit):
        chunkft("chat", str(out))
    assert f"but a checkpoint: give {out / 'checkpoint-1'}" in capsys.readouterr().err

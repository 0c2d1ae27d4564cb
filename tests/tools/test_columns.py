"""What a user says of data that is not as the formats have it: other names, a split, a system message, single turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers

from chunkft_fx.errors import CheckpointMismatch, DataError, OptionError
from chunkft_fx.tools.changes.vocabulary import add_tokens
from chunkft_fx.tools.data.formats import Chat, adjusted
from chunkft_fx.tools.data.records import Source, located, records
from chunkft_fx.tools.data.rows import Sequences
from chunkft_fx.tools.data.store import Reading, stored
from chunkft_fx.tools.data.templates import set_template
from chunkft_fx.tools.load import load_tokenizer, source
from chunkft_fx.tools.report.log import TRACKERS
from chunkft_fx.tools.training.data import Batches
from chunkft_fx.tools.training.loop import make_scheduler, train
from chunkft_fx.tools.training.options import TrainOptions
from tests.support.tiny_text import TEMPLATE, character_tokenizer, tiny_folder
from tests.tools.test_formats import learned
from tests.tools.test_tools import EAGER, chunkft, compiled, sequences

USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
TURN, ASKED = "assistant:ho;", "_" * len("user:hi;")


def texts(path: Path, tokenizer: Any, **reading: Any) -> list[str]:
    """The tokens of each piece, with ``_`` for what is not learned."""
    data = stored([str(path)], tokenizer, Reading(200, **reading))
    found = []
    for entry in data:
        tokens = tokenizer.convert_ids_to_tokens(entry["ids"])
        found.append("".join(t if known else "_" for t, known in zip(tokens, entry["learned"], strict=True)))
    return found


def test_fields_of_other_names_are_read_as_those_of_a_format(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "a.jsonl", character_tokenizer()
    entries = [{"question": "ab", "answer": "cd", "prompt": "not this"}, {"prompt": "ef", "completion": "gh"}]
    path.write_text("\n".join(map(json.dumps, entries)))
    assert texts(path, tokenizer, columns={"prompt": "question", "completion": "answer"}) == ["__cd</s>", "__gh</s>"]
    with pytest.raises(DataError, match="has the fields question, answer"):
        texts(path, tokenizer, columns={"prompt": "query"})
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"prompts": "a"}, "columns has prompts, which no format has"),
        ({"text": 1}, "has 1 for"),
    )
    for columns, message in refused:
        with pytest.raises(OptionError, match=message):
            Reading(8, columns=columns)


def test_a_system_message_stands_where_there_is_none(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "a.jsonl", character_tokenizer(TEMPLATE)
    own = {"role": "system", "content": "own"}
    entries: list[dict[str, Any]] = [
        {"messages": [USER, REPLY]},
        {"messages": [own, USER, REPLY]},
        {"prompt": [USER], "completion": [REPLY]},
    ]
    path.write_text("\n".join(map(json.dumps, entries)))
    begin = "_" * len("system:own;")
    assert texts(path, tokenizer, system="new") == [f"{begin}{ASKED}{TURN}</s>"] * 3
    made = adjusted(Chat([USER, REPLY], first=1), "new", False)
    assert made.messages[0] == {"role": "system", "content": "new"} and made.first == 2


def test_the_last_turn_alone_or_those_of_a_weight_are_learned(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "a.jsonl", character_tokenizer(TEMPLATE)
    path.write_text(json.dumps({"messages": [USER, REPLY, USER, REPLY, USER]}))
    kept = "_" * len(TURN)
    assert texts(path, tokenizer) == [f"{(ASKED + TURN) * 2}{ASKED}</s>"]
    assert texts(path, tokenizer, last_turn=True) == [f"{ASKED}{kept}{ASKED}{TURN}{ASKED}</s>"]
    record = {"messages": [USER, REPLY | {"weight": 0}, USER, REPLY | {"weight": 1}]}
    assert learned(record, tokenizer) == (f"{ASKED}{kept}{ASKED}{TURN}</s>", 0)
    with pytest.raises(DataError, match="assistant, some of a weight of 0"):
        learned({"messages": [USER, REPLY | {"weight": 0}]}, tokenizer)
    with pytest.raises(OptionError, match="last-turn and train-on-prompts"):
        Reading(8, train_on_prompts=True, last_turn=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", Source("owner/name")),
        ("owner/name:test", Source("owner/name", None, "test")),
        ("openai/gsm8k/main", Source("openai/gsm8k", "main")),
        ("openai/gsm8k/main:test", Source("openai/gsm8k", "main", "test")),
        ("./a/b/c", Source("./a/b/c")),
        ("no/such/file.jsonl", Source("no/such/file.jsonl")),
    ],
)
def test_a_name_can_have_a_subset_and_a_split(text: str, expected: Source) -> None:
    assert located(text) == expected


def test_splits_of_folders_and_subsets_of_the_hub_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, odd = tmp_path / "saved", tmp_path / "odd:name.txt"
    both = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    datasets.DatasetDict(both).save_to_disk(saved)
    odd.write_text("abc")
    assert [r["text"] for _, r in records(str(saved))] == ["train"]
    assert [r["text"] for _, r in records(f"{saved}:test")] == ["test"]
    assert [str(r) for _, r in records(str(odd))] == ["abc"]
    with pytest.raises(DataError, match="has no split 'dev', but train, test"):
        list(records(f"{saved}:dev"))
    asked: list[Any] = []

    def load(*names: str, **options: Any) -> list[Any]:
        asked.append((names, options))
        return [{"text": "x"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    list(records("openai/gsm8k/main:test"))
    assert asked == [(("openai/gsm8k", "main"), {"data_files": None, "split": "test", "streaming": True})]


def test_a_changed_split_of_a_folder_is_read_anew(tmp_path: Path) -> None:
    tokenizer, saved = character_tokenizer(), tmp_path / "saved"
    for text in ("abc", "abcd"):
        datasets.DatasetDict({"dev": datasets.Dataset.from_list([{"text": text}])}).save_to_disk(saved)
        assert texts(Path(f"{saved}:dev"), tokenizer) == [f"{text}</s>"]


@pytest.mark.parametrize(("warmup", "steps"), [(0.25, 2), (2, 2), (0.3, 3), (0, 0), (1, 1)])
def test_a_warm_up_can_be_a_share(warmup: float, steps: int) -> None:
    options = TrainOptions(8, warmup=warmup)
    assert options.counted(options.warmup) == steps
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=options.lr)
    scheduler, rates = make_scheduler(optimizer, options), []
    for _ in range(8):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates.index(max(rates)) == steps


@pytest.mark.parametrize("name", ["warmup", "save_every", "eval_every"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), float("inf")])
def test_what_is_neither_steps_nor_a_share_is_refused(name: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"{name.replace('_', '-')} is {value}"):
        TrainOptions(8, **{name: value})  # type: ignore[arg-type]


def test_rows_are_taken_as_they_stand_if_asked() -> None:
    rows = Sequences(torch.arange(12).reshape(6, 2))

    def dealt(batches: Batches, count: int) -> list[int]:
        return [int(next(batches)["input_ids"][0, 0]) // 2 for _ in range(count)]

    batches = Batches(rows, 1, 0, shuffled=False)
    assert dealt(batches, 8) == [0, 1, 2, 3, 4, 5, 0, 1]
    resumed = Batches(rows, 1, 0, shuffled=False)
    resumed.load_state_dict(batches.state_dict())
    assert dealt(resumed, 2) == [2, 3]
    with pytest.raises(CheckpointMismatch, match=r"shuffled False \(now True\)"):
        Batches(rows, 1, 0).load_state_dict(batches.state_dict())
    old = {name: value for name, value in Batches(rows, 1, 0).state_dict().items() if name != "shuffled"}
    Batches(rows, 1, 0).load_state_dict(old)  # of before there was a choice


def test_chatml_asks_for_its_marks_and_learns_what_the_assistant_says() -> None:
    tokenizer = character_tokenizer()
    with pytest.raises(OptionError, match=r"--add-special-tokens '<\|im_start\|>' --add-special-tokens '<\|im_end\|>'"):
        set_template(tokenizer, "chatml")
    add_tokens(tokenizer, [], ["<|im_start|>", "<|im_end|>"])
    set_template(tokenizer, "chatml")
    begin = "_" * len("*user\nhi*\n*assistant\n")  # a mark is one token
    assert learned({"messages": [USER, REPLY]}, tokenizer) == (f"{begin}ho<|im_end|>\n</s>", 0)


def test_a_file_that_is_given_twice_counts_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ab"}')
    assert len(stored([str(path), str(path)], character_tokenizer(), Reading(8))) == 2


def test_the_norm_of_gradients_is_told_where_there_is_one() -> None:
    for clip, is_there in ((1.0, True), (None, False)):
        seen: list[Any] = []
        train(compiled(1), sequences(), TrainOptions(1, 2, max_grad_norm=clip), on_step=seen.append)
        assert (seen[0].grad_norm is not None) == is_there
        assert not is_there or seen[0].grad_norm > 0


@pytest.mark.parametrize("name", TRACKERS)
def test_each_tracker_is_one_of_accelerates_for_a_package_of_its_name(name: str) -> None:
    from accelerate import tracking

    assert getattr(tracking, TRACKERS[name]).name == name


def test_a_branch_of_a_model_stands_behind_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert source("owner/name@v1.0") == ("owner/name", {"revision": "v1.0"})
    assert source("owner/name") == ("owner/name", {})
    asked: list[Any] = []
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: asked.append((a, k)))
    load_tokenizer("owner/name@v1.0")
    assert asked == [(("owner/name",), {"revision": "v1.0"})]


def test_a_file_of_options_has_tables_of_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, data, config = tiny_folder(tmp_path / "model"), tmp_path / "a.jsonl", tmp_path / "run.toml"
    data.write_text("\n".join(json.dumps({"q": f"what{i}", "a": "ab"}) for i in range(8)))
    config.write_text(
        'columns = { instruction = "q", output = "a" }\nsystem = "be"\nlast-turn = true\nwarmup = 0.5\nseq-len = 64\n'
        'chat-template = "zephyr"\nsteps = 4\n'
    )
    arguments = ["train", str(folder), str(data), "--config", str(config), "--out", str(tmp_path / "out"), *EAGER]
    chunkft(*arguments, "--dry-run")
    printed = capsys.readouterr().out
    assert "< | s y s t e m | >" in printed and "+ 'a b" in printed

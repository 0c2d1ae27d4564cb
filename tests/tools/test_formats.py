"""What records are by their fields, how conversations are written, and which of their tokens are learned."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Regex, pre_tokenizers

from chunkft_fx.errors import DataError, OptionError
from chunkft_fx.tools.data.formats import ALPACA, Chat, Reply, Text, document
from chunkft_fx.tools.data.records import records
from chunkft_fx.tools.data.templates import set_template
from chunkft_fx.tools.data.tokens import tokenized, written
from tests.support.tiny_text import EOS, TEMPLATE, character_tokenizer

USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
RECORD = {"text": "hi"}


def learned(record: Any, tokenizer: Any, all_learned: bool = False) -> tuple[str, int]:
    """What is learned of a record, with ``_`` in the place of the rest, and how many turns have no place."""
    made = document("here", record, has_template=tokenizer.chat_template is not None)
    (piece,) = tokenized([written("here", made, tokenizer, all_learned)], tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(piece.ids)
    return "".join(t if is_learned else "_" for t, is_learned in zip(tokens, piece.learned, strict=True)), piece.lost


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "a"}, Text("a")),
        ({"text": "a", "messages": [USER]}, Text("a")),
        ({"prompt": "a", "completion": "b"}, Reply("a", "b")),
        ({"prompt": [USER], "completion": [REPLY]}, Chat([USER, REPLY], first=1)),
        ({"messages": [USER | {"name": None}, REPLY]}, Chat([USER, REPLY])),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "system": "s"},
            Chat([{"role": "system", "content": "s"}, USER, REPLY]),
        ),
        ({"instruction": "hi", "input": "", "output": "ho"}, Chat([USER, REPLY])),
        (
            {"instruction": "hi", "input": "in", "output": "ho"},
            Chat([{"role": "user", "content": "hi\n\nin"}, REPLY]),
        ),
    ],
)
def test_fields_say_what_a_record_is(record: dict[str, Any], expected: Any) -> None:
    assert document("here", record, has_template=True) == expected


def test_instructions_without_a_chat_template_have_alpacas_own_prompt() -> None:
    made = document("here", {"instruction": "hi", "input": "in", "output": "ho"})
    assert isinstance(made, Reply)
    assert made.prompt == ALPACA.format(
        paired=", paired with an input that provides further context", instruction="hi", given="### Input:\nin\n\n"
    )
    assert made.completion == "ho"


def test_text_is_learned_whole_and_a_prompt_not() -> None:
    tokenizer = character_tokenizer()
    assert learned({"text": "ab"}, tokenizer) == (f"ab{EOS}", 0)
    assert learned({"prompt": "ab", "completion": "cd"}, tokenizer) == (f"__cd{EOS}", 0)
    assert learned({"prompt": "ab", "completion": "cd"}, tokenizer, all_learned=True) == (f"abcd{EOS}", 0)


def test_of_a_conversation_each_turn_of_the_assistant_is_learned() -> None:
    tokenizer = character_tokenizer(TEMPLATE)
    text = "_" * len("user:hi;") + "assistant:ho;"
    assert learned({"messages": [USER, REPLY, USER, REPLY]}, tokenizer) == (text * 2 + EOS, 0)
    set_template(tokenizer, "zephyr")  # it has a prompt of its own, which is not learned
    text = "_" * len("<|user|>\nhi.\n<|assistant|>\n") + f"ho{EOS}\n"
    assert learned({"messages": [USER, REPLY, USER, REPLY]}, tokenizer) == (text * 2, 0)
    whole, _ = learned({"messages": [USER, REPLY]}, tokenizer, all_learned=True)
    assert whole == f"<|user|>\nhi{EOS}\n<|assistant|>\nho{EOS}\n"


# The last answer is written in another way than earlier ones, and the prompt goes on with what it need not begin with.
THOUGHTS = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}"
    "{{ '!' if loop.last and m['role'] == 'assistant' else '.' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:?' }}{% endif %}"
)


def test_turns_that_a_template_writes_otherwise_later_are_counted_and_not_learned() -> None:
    tokenizer = character_tokenizer(THOUGHTS)
    assert learned({"messages": [USER, REPLY]}, tokenizer) == (f"{'_' * 7}ho!{EOS}", 0)
    assert learned({"messages": [USER, REPLY, USER, REPLY]}, tokenizer) == (f"{'_' * 17}ho!{EOS}", 1)
    with pytest.raises(DataError, match=r"here has no turn of the assistant to learn \(the chat template writes them"):
        learned({"messages": [USER, REPLY, USER]}, tokenizer)
    with pytest.raises(DataError, match=r"\(its roles are user\); mend it, or give --train-on-prompts"):
        learned({"messages": [USER]}, tokenizer)


def test_a_token_across_the_end_of_a_prompt_is_not_learned() -> None:
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["bc"])
    assert learned({"prompt": "ab", "completion": "cd"}, tokenizer)[0] == f"__d{EOS}"


def test_a_tokenizer_that_does_not_say_where_its_tokens_are_takes_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = character_tokenizer(TEMPLATE)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    rows: list[dict[str, Any]] = [{"messages": [USER, REPLY, USER, REPLY]}, {"prompt": "ab", "completion": "c"}, RECORD]
    fast = [learned(row, tokenizer) for row in rows]
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert [learned(row, tokenizer) for row in rows] == fast


def test_a_file_can_hold_the_template(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    tokenizer = character_tokenizer()
    set_template(tokenizer, str(file))
    assert tokenizer.chat_template == TEMPLATE
    with pytest.raises(OptionError, match="is no file; give one with a Jinja template, or zephyr"):
        set_template(tokenizer, "chatty")


def read(source: Path | str) -> list[Any]:
    return [record for _, record in records(str(source))]


def test_all_kinds_of_files_and_folders_are_read(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "files").mkdir()
    table.to_parquet(tmp_path / "files" / "train.parquet")
    for name in ("a.parquet", "a.csv", "saved", "splits", "a.json", "a.jsonl", "files"):
        assert read(tmp_path / name) == rows, name
    assert next(records(str(tmp_path / "a.parquet")))[0] == f"{tmp_path}/a.parquet row 1"


def test_a_folder_of_other_splits_and_a_broken_table_are_named(tmp_path: Path) -> None:
    datasets.DatasetDict({"test": datasets.Dataset.from_list([RECORD])}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="has no split 'train', but test"):
        read(tmp_path / "splits")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"a\.parquet could not be read"):
        read(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text('{"text": "a"}')
    with pytest.raises(DataError, match=r"a\.json is one JSON value"):
        read(tmp_path / "a.json")


def test_a_name_with_an_owner_is_a_data_set_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(name: str, subset: str | None = None, **options: Any) -> list[Any]:
        asked.append((name, options["split"], options["streaming"]))
        return [RECORD]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("owner/name") == [RECORD]
    assert asked == [("owner/name", "train", True)]
    for missing in ("name", "owner/name.jsonl", "./owner/name"):
        with pytest.raises(DataError, match="there is no data at"):
            read(missing)


def test_a_large_text_file_is_read_in_parts_that_begin_and_end_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chunkft_fx.tools.data.records.PART", 4)
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\nx")
    parts = [document("here", part) for part in read(tmp_path / "a.txt")]
    first, *others, last = parts
    assert (first, last) == (Text("one\n", True, False), Text("x", False, True))
    assert others == [Text("two\n", False, False), Text("three\n", False, False)]
    tokenizer = character_tokenizer()
    ids = [piece.ids for piece in tokenized([written("", part, tokenizer) for part in parts], tokenizer)]
    (whole,) = tokenized([written("", Text("one\ntwo\nthree\nx"), tokenizer)], tokenizer)
    assert list(itertools.chain.from_iterable(ids)) == whole.ids

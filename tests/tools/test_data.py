"""Training text: what is read from files, how it is packed, and in which order batches come."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from chunkft_fx.errors import CheckpointMismatch, DataError
from chunkft_fx.tools.data.rows import Sequences
from chunkft_fx.tools.data.stream import pack
from chunkft_fx.tools.training.data import Batches
from tests.support.tiny_text import TEMPLATE, character_tokenizer, texts


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "one\n\ntwo\n")
    assert texts(path, character_tokenizer()) == ["one\n\ntwo\n"]


def test_each_line_of_a_jsonl_file_is_a_document(tmp_path: Path) -> None:
    # U+2028 may stand inside a JSON string, and Python's splitlines would break the line there
    path = write(tmp_path, "a.jsonl", '{"text": "one"}\n\n{"text": "two\u2028three"}\n')
    assert texts(path, character_tokenizer()) == ["one", "two\u2028three"]


def test_another_field_can_hold_the_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "no", "body": "yes"}')
    assert texts(path, character_tokenizer(), "body") == ["yes"]


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    path = write(tmp_path, "a.jsonl", json.dumps(chat))
    assert texts(path, character_tokenizer(TEMPLATE)) == ["user:hi;assistant:ho;"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "holds no text"),
        ("a.txt", "", "holds no text"),
        ("a.txt", " \n\t\n", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", '["a"]', "line 1 is list, not an object"),
        ("a.jsonl", '{"body": "a", "id": 3}', "has the fields body, id; known are chat: messages; .*--field"),
        ("a.jsonl", '{"text": 3}', "is int, not text"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "no chat template; give --chat-template"),
        ("a.jsonl", '{"conversations": [{"from": "robot", "value": "a"}]}', "a turn is from 'robot'"),
        ("a.jsonl", '{"conversations": [{"from": "gpt", "value": 1}]}', "is int, not text"),
    ],
)
def test_text_that_cannot_be_used_is_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        texts(write(tmp_path, name, content), character_tokenizer())


def test_messages_that_the_template_refuses_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"messages": [{"role": "user", "content": ""}]}')
    template = "{{ raise_exception('no content') }}"
    with pytest.raises(DataError, match="line 1: the chat template refused these messages: no content"):
        texts(path, character_tokenizer(template))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no data at .*absent\.txt"):
        texts(tmp_path / "absent.txt", character_tokenizer())


def test_packing_joins_documents_with_end_of_text_and_drops_the_remainder() -> None:
    tokenizer = character_tokenizer()
    packed = pack(["abc", "de"], tokenizer, 3)
    ids = tokenizer.convert_tokens_to_ids(["a", "b", "c", tokenizer.eos_token, "d", "e"])
    assert packed.tolist() == [ids[:3], ids[3:]]
    assert packed.dtype == torch.int64


def test_text_too_short_for_one_sequence_is_refused() -> None:
    with pytest.raises(DataError, match="4 tokens, too few for one sequence of 5"):
        pack(["abc"], character_tokenizer(), 5)


def numbered(count: int) -> Sequences:
    return Sequences(torch.arange(count).view(count, 1))


def ids(batches: Batches) -> torch.Tensor:
    return next(batches)["input_ids"]


def test_an_epoch_deals_every_sequence_once_and_the_next_in_another_order() -> None:
    batches = Batches(numbered(12), 3, seed=1)
    epochs = [[int(i) for _ in range(4) for i in ids(batches).flatten()] for _ in range(2)]
    assert [sorted(e) for e in epochs] == [list(range(12))] * 2
    assert epochs[0] != epochs[1]


def test_the_seed_decides_the_order() -> None:
    first, same, other = (ids(Batches(numbered(50), 50, seed=s)) for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_batches_continue_at_a_saved_position() -> None:
    batches = Batches(numbered(7), 2, seed=3)
    for _ in range(4):
        next(batches)
    resumed = Batches(numbered(7), 2, seed=3)
    resumed.load_state_dict(batches.state_dict())
    for _ in range(5):
        assert torch.equal(ids(resumed), ids(batches))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (Batches(numbered(8), 2, seed=3), r"sequences 7 \(now 8\)"),
        (Batches(numbered(7), 3, seed=3), r"batch_size 2 \(now 3\)"),
        (Batches(numbered(7), 2, seed=4), r"seed 3 \(now 4\)"),
    ],
)
def test_a_position_in_other_data_is_refused(batches: Batches, message: str) -> None:
    with pytest.raises(CheckpointMismatch, match=message):
        batches.load_state_dict(Batches(numbered(7), 2, seed=3).state_dict())


def test_a_batch_larger_than_the_text_is_refused() -> None:
    with pytest.raises(DataError, match="3 sequences, fewer than a batch of 4"):
        Batches(numbered(3), 4, seed=0)

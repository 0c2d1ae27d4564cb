"""Text files as they come: each kind of damage is one error with file and line, or read right."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunkft_fx.errors import DataError
from chunkft_fx.tools.data.stream import pack
from tests.support.tiny_text import TEMPLATE, character_tokenizer, texts

GOOD = b'{"text": "good"}\n'
DEEP = b'{"text": "a", "more": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


def read(folder: Path, name: str, content: bytes) -> list[str]:
    path = folder / name
    path.write_bytes(content)
    return texts(path, character_tokenizer(TEMPLATE))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (DEEP, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": "a", "id": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
        (b'{"text": "a \\ud83d b"}', r"holds \\ud83d, half of a surrogate pair"),
        (b'{"messages": [{"role": "user", "content": "\\udc00"}]}', r"holds \\udc00, half of a surrogate pair"),
        (b'{"text": "caf\xe9"}', "is not UTF-8 text"),
        (b'{"text": "a\x00b"}', "holds a NUL byte"),
        (b"\x00" * 64, "holds a NUL byte"),
        (b'{"messages": "hello"}', '"messages" is not a list of objects'),
        (b'{"messages": []}', '"messages" is not a list of objects'),
        (b'{"messages": ["hello"]}', '"messages" is not a list of objects'),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl line 3.*{message}") as caught:
        read(tmp_path, "a.jsonl", GOOD + b"\n" + line + b"\n" + GOOD)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("one\ntwo\n".encode("utf-16"), "line 1 is not UTF-8 text"),
        ("one\ntwo\n".encode("utf-16-le"), "line 1 holds a NUL byte"),
        ("one\ntwo \u00e9\n".encode("latin-1"), "line 2 is not UTF-8 text"),
        (b"one\ntwo\nthree\x00", "line 3 holds a NUL byte"),
    ],
)
def test_text_in_another_encoding_is_refused_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.txt {message}"):
        read(tmp_path, "a.txt", content)


def test_a_byte_order_mark_and_empty_lines_and_line_ends_of_windows_are_no_text(tmp_path: Path) -> None:
    assert read(tmp_path, "a.jsonl", b"\xef\xbb\xbf" + GOOD + b"\r\n  \r\n" + GOOD) == ["good", "good"]
    assert read(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree") == ["one\ntwo\nthree"]


def test_an_escaped_nul_is_a_character_like_others(tmp_path: Path) -> None:
    documents = read(tmp_path, "a.jsonl", b'{"text": "a\\u0000b"}')
    assert documents == ["a\0b"]
    assert pack(documents, character_tokenizer(), 2).shape == (2, 2)


def test_lines_of_objects_are_read_as_such_under_each_of_their_names(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.JSONL", "a.ndjson"):
        assert read(tmp_path, name, GOOD) == ["good"]
    with pytest.raises(DataError, match=r"a\.json is one JSON value; give a \.jsonl file"):
        read(tmp_path, "a.json", GOOD)

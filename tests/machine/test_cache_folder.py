"""The cache folder: a file a key, replaced as a whole, the longest unused dropped where they take too much."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest

from chunkft_fx.machine.cache import CacheFolder

FOLDER = CacheFolder("things", 1000)


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("CHUNKFT_CACHE", str(tmp_path))
    return tmp_path / "things"


def aged(key: str, seconds: float) -> None:
    os.utime(FOLDER.path(key), (seconds, seconds))


def test_a_text_is_found_under_its_key_alone(root: Path) -> None:
    assert FOLDER.load("a") is None
    FOLDER.store("a", "text\nof a")
    FOLDER.store("b", "text of b")
    FOLDER.store("a", "another")
    assert FOLDER.load("a") == "another"
    assert FOLDER.load("b") == "text of b"
    assert sorted(p.name for p in root.iterdir()) == ["a", "b"]


def test_what_was_used_longest_ago_gives_way(root: Path) -> None:
    for age, key in enumerate("abcd"):
        FOLDER.store(key, key * 300 if key != "d" else "d")
        aged(key, 1000.0 + age)
    assert FOLDER.load("a") == "a" * 300  # which is a use
    FOLDER.store("e", "e" * 300)
    assert sorted(p.name for p in root.iterdir()) == ["a", "c", "d", "e"]


def test_what_is_larger_than_the_folder_is_not_kept(root: Path) -> None:
    FOLDER.store("a", "a" * 1001)
    assert list(root.iterdir()) == []


def test_a_part_that_a_process_left_behind_gives_way_too(root: Path) -> None:
    FOLDER.store("a", "a" * 10)
    FOLDER.path("b.1234.1").write_text("b" * 900)
    aged("b.1234.1", 1000.0)
    FOLDER.store("c", "c" * 200)
    assert sorted(p.name for p in root.iterdir()) == ["a", "c"]


def test_a_file_that_cannot_be_read_counts_as_none(caplog: pytest.LogCaptureFixture) -> None:
    FOLDER.store("a", "text")
    FOLDER.path("a").write_bytes(b"\xff\xfe\xff")
    with caplog.at_level(logging.WARNING, logger="chunkft_fx.machine.cache"):
        assert FOLDER.load("a") is None
    assert "not readable" in caplog.text


def test_a_folder_that_cannot_be_written_is_worked_around(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    root.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, logger="chunkft_fx.machine.cache"):
        FOLDER.store("a", "text")
    assert "cannot be written" in caplog.text
    assert FOLDER.load("a") is None


def test_a_reader_never_sees_half_of_what_many_write(root: Path) -> None:
    texts = {letter * 200 for letter in "abcdef"}
    found: set[str | None] = set()
    stopped = threading.Event()

    def read() -> None:
        while not stopped.is_set():
            found.add(FOLDER.load("key"))

    def write(text: str) -> None:
        for _ in range(30):
            FOLDER.store("key", text)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stopped.set()
    reader.join()
    assert found - {None} <= texts
    assert [p.name for p in root.iterdir()] == ["key"]

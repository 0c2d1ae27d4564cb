"""Checkpoint files of version 1: what is in them, damage is found, and nothing is run that a file brings along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chunkft_fx.errors import CheckpointMismatch
from chunkft_fx.tools.training.checkpoint_file import read, read_old
from tests.support.old_checkpoint import write_old

STATE: dict[str, Any] = {"step": 3, "weights": torch.arange(1000.0)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pt"
    write_old(path, STATE)
    return path


def assert_is_as_written(path: Path) -> None:
    found = read(path)
    assert found["step"] == 3
    assert torch.equal(found["weights"], STATE["weights"])


def test_what_was_written_is_read(path: Path) -> None:
    assert_is_as_written(path)
    assert torch.load(path, weights_only=True)["step"] == 3  # by torch alone, too


def test_a_flipped_bit_is_found_wherever_it_is(path: Path) -> None:
    whole = path.read_bytes()
    for place in (0, 100, len(whole) // 2, len(whole) - 60, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointMismatch, match=rf"{path} is damaged: its checksum"):
            read(path)
    path.write_bytes(whole)
    assert_is_as_written(path)


@pytest.mark.parametrize("length", [0, 10, 500, -1])
def test_a_file_that_is_cut_short_is_refused(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointMismatch, match="cut short"):
        read(path)


def test_a_foreign_file_is_refused(path: Path) -> None:
    torch.save(STATE, path)
    with pytest.raises(CheckpointMismatch, match="not a checkpoint"):
        read(path)
    write_old(path, [1, 2])
    with pytest.raises(CheckpointMismatch, match="holds a list"):
        read(path)
    with pytest.raises(CheckpointMismatch, match="cannot be read"):
        read(path.parent)


@pytest.mark.parametrize("version", [None, 0, 2])
def test_a_file_of_another_version_is_refused(path: Path, version: Any) -> None:
    write_old(path, STATE | {"version": version})
    with pytest.raises(CheckpointMismatch, match=rf"version {version} of the format.*reads files of version 1"):
        read_old(path)


def test_a_file_with_something_missing_is_refused(path: Path) -> None:
    write_old(path, STATE | {"version": 1})
    with pytest.raises(CheckpointMismatch, match="has no options, model, optimizer"):
        read_old(path)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return (Path.touch, (self.place,))


def test_nothing_is_run_that_a_file_brings_along(path: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    write_old(path, {"step": Payload(made)})
    with pytest.raises(CheckpointMismatch, match="not loaded") as caught:
        read(path)
    assert not made.exists()
    assert "weights_only" not in str(caught.value)  # torch's own message tells how to run it

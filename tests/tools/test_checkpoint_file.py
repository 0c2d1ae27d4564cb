"""Checkpoints on disk: whole or not there, damage found, and nothing run that a file brings along."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from chunkft_fx.errors import CheckpointMismatch, SaveFailed
from chunkft_fx.tools.training import checkpoint_file
from chunkft_fx.tools.training.checkpoint_file import UNFINISHED, read, write

STATE: dict[str, Any] = {"step": 3, "weights": torch.arange(1000.0)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pt"
    write(path, STATE)
    return path


def assert_is_as_written(path: Path) -> None:
    found = read(path)
    assert found["step"] == 3
    assert torch.equal(found["weights"], STATE["weights"])
    assert [p.name for p in path.parent.iterdir()] == [path.name]


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
    write(path, [1, 2])  # type: ignore[arg-type]
    with pytest.raises(CheckpointMismatch, match="holds a list"):
        read(path)
    with pytest.raises(CheckpointMismatch, match="cannot be read"):
        read(path.parent)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return (Path.touch, (self.place,))


def test_nothing_is_run_that_a_file_brings_along(path: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    write(path, {"step": Payload(made)})
    with pytest.raises(CheckpointMismatch, match="not loaded") as caught:
        read(path)
    assert not made.exists()
    assert "weights_only" not in str(caught.value)  # torch's own message tells how to run it


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(path: Path) -> None:
    path.with_name(path.name + UNFINISHED).symlink_to("/dev/full")  # what is written there finds no space
    with pytest.raises(SaveFailed, match=r"disk mounted at /.* is full \(.* free\): .*checkpoint\.pt was not written"):
        write(path, {"step": 4, "weights": torch.zeros(100_000)})
    assert_is_as_written(path)


def test_another_failure_leaves_the_last_checkpoint(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SaveFailed, match=r"checkpoint\.pt was not written.*Input/output error"):
        write(path, {"step": 4})
    assert_is_as_written(path)


def test_an_interrupted_write_leaves_the_last_checkpoint(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(path, {"step": 4})
    assert_is_as_written(path)


def test_the_file_is_on_the_disk_before_it_has_its_name_and_the_folder_after(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        done.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write(path, STATE)
    assert done == [path.name + UNFINISHED, "replace", path.parent.name]


def test_the_disk_of_a_path_is_where_it_is_mounted(tmp_path: Path) -> None:
    error = OSError(28, "No space left on device")
    assert "mounted at /proc is full" in str(checkpoint_file.save_failed(Path("/proc/self/absent"), error))
    assert "was not written" in str(checkpoint_file.save_failed(tmp_path, RuntimeError("Io error: (os error 13)")))

"""What is wrong with a checkpoint is named, and what cannot be written leaves those that are there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import chunkft_fx
from chunkft_fx.checkpoints import save as save_file
from chunkft_fx.checkpoints.disk.folders import checkpoints, newest, read_record
from chunkft_fx.checkpoints.disk.tensor_file import places
from chunkft_fx.errors import CheckpointMismatch, ChunkFTWarning, OptimizerMismatch, OptionError, SaveFailed
from tests.support.checkpointed import Made, Net, assert_equal


def fed(dtype: torch.dtype = torch.float32, **options: Any) -> Made:
    """A training that is not traced: its steps go by gradients that are given to it."""
    torch.manual_seed(0)
    model = chunkft_fx.compile(Net().to(dtype), "1GB", chunks=3, interval=1, order="ascending", backend="eager")
    optimizer = chunkft_fx.AdamW(model, lr=1e-2, **options)
    return Made(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2))


def feed(training: Made, steps: int = 3) -> None:
    for _ in range(steps):
        for s in training.model.active_slices():
            s.grad = torch.ones_like(s.weight(), dtype=torch.float32)
        training.optimizer.step()
        training.scheduler.step()


def save(training: Made, folder: Path, step: int = 3, **more: Any) -> Path:
    return chunkft_fx.save(folder, training.model, training.optimizer, step, scheduler=training.scheduler, **more)


@pytest.fixture
def training() -> Made:
    training = fed()
    feed(training)
    return training


def refused(folder: Path, message: str) -> None:
    """Loading fails before anything changes."""
    training = fed()
    before = training.values()
    with pytest.raises(CheckpointMismatch, match=message):
        chunkft_fx.load(folder, training.model, training.optimizer, scheduler=training.scheduler)
    assert_equal(training.values(), before)


def test_a_flipped_bit_is_found_in_every_file_and_named_with_the_tensor(training: Made, tmp_path: Path) -> None:
    path = save(training, tmp_path)
    files = sorted(p for p in path.iterdir())
    assert len(files) == 4
    for file in files:
        whole = file.read_bytes()
        known = {} if file.suffix == ".json" else {p.start: (key, p.nbytes) for key, (_, p) in places(file).items()}
        spots = {start + nbytes // 2: rf"{file} is damaged in tensor '{key}'" for start, (key, nbytes) in known.items()}
        begin = min(known, default=len(whole))
        spots |= dict.fromkeys((0, 9, begin // 2, len(whole) - 2), rf"{file} is damaged")
        for at, message in spots.items():
            damaged = bytearray(whole)
            damaged[at] ^= 4
            file.write_bytes(damaged)
            with pytest.raises(CheckpointMismatch, match=message):
                chunkft_fx.load(path, training.model, training.optimizer)
        for wrong in (whole[:-3], whole + b"}", b""):
            file.write_bytes(wrong)
            refused(path, rf"{file} is damaged")
        file.unlink()
        refused(path, "cannot be read|there is no checkpoint")
        file.write_bytes(whole)
    chunkft_fx.load(path, training.model, training.optimizer)


def full_disk(descriptor: int, data: Any, start: int) -> int:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        return os.write(full, data)
    finally:
        os.close(full)


@pytest.mark.parametrize("wait", [True, False])
def test_a_full_disk_is_named_and_older_checkpoints_stay(
    training: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: bool
) -> None:
    save(training, tmp_path, 2)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full_disk)
        with pytest.raises(SaveFailed, match=r"disk mounted at /.* is full \(.* free\): .*-3 was not written"):
            save(training, tmp_path, 3, keep=1, wait=wait)
            chunkft_fx.wait_for_saves()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    chunkft_fx.wait_for_saves()  # it was told once
    save(training, tmp_path, 3, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def test_an_error_of_the_library_that_writes_weights_is_one_of_the_disk(
    tmp_path: Path, training: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(save_file, "write_weights", fail)
    with pytest.raises(SaveFailed, match="is full"):
        save(training, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_read_only_folder_is_named_at_the_call(training: Made, tmp_path: Path) -> None:
    folder = Path("/proc/self") if os.geteuid() == 0 else tmp_path  # root may write wherever there are files
    if folder == tmp_path:
        tmp_path.chmod(0o500)
    for wait in (True, False):
        with pytest.raises(SaveFailed, match=rf"{folder}/checkpoint-3 was not written"):
            save(training, folder, wait=wait)


def test_a_file_in_place_of_the_folder_is_named(training: Made, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SaveFailed, match="checkpoint-3 was not written"):
        save(training, tmp_path / "file")


def test_an_error_of_the_writer_comes_with_the_next_step_which_changes_nothing(
    training: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        save(training, tmp_path, wait=False)
        before = training.values()  # waits for the writer
        with pytest.raises(SaveFailed, match=r"checkpoint-3 was not written.*Input/output error"):
            feed(training, 1)
    assert_equal(training.values(), before)
    assert not list(tmp_path.iterdir())
    feed(training, 1)
    save(training, tmp_path)


def test_an_error_of_the_writer_comes_with_the_next_save(
    training: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        save(training, tmp_path, 1, wait=False)
        with pytest.raises(SaveFailed, match="checkpoint-1 was not written"):
            save(training, tmp_path, 2)
    save(training, tmp_path, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def failing(descriptor: int) -> None:
    raise OSError(5, "Input/output error")


PROGRAM = """
import os, sys, time
from pathlib import Path
from tests.checkpoints.test_damage import fed, feed, save, failing
from chunkft_fx.checkpoints.saving import Saving
training = fed()
feed(training)
begin = Saving._next
Saving._next = lambda self: (time.sleep(0.05), begin(self))[1]
if sys.argv[2] == "fails":
    os.fsync = failing
save(training, Path(sys.argv[1]), wait=False)
"""


@pytest.mark.parametrize("how", ["fails", pytest.param("works", marks=pytest.mark.slow)])
def test_a_process_that_ends_waits_for_the_writer_and_tells_its_error(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), how]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [p.name for p in tmp_path.iterdir()]
    assert found == ([] if how == "fails" else ["checkpoint-3"])
    assert ("SaveFailed: " in ended.stderr) == (how == "fails")


def test_the_last_of_them_stay_and_the_best(training: Made, tmp_path: Path) -> None:
    for step in (1, 2, 3, 10, 9):
        save(training, tmp_path, step, keep=2, best=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    assert newest(tmp_path) == tmp_path / "checkpoint-9"  # what was saved last, whatever its number
    save(training, tmp_path, 9)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-9", "checkpoint-10"}
    assert chunkft_fx.load(tmp_path / "checkpoint-10", training.model).step == 10


def test_one_that_was_to_be_replaced_when_the_process_died_is_found(training: Made, tmp_path: Path) -> None:
    path = save(training, tmp_path)
    path.rename(tmp_path / "checkpoint-3.replaced")
    assert chunkft_fx.load(tmp_path, training.model).step == 3
    save(training, tmp_path, 3)
    save(training, tmp_path, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]


def test_other_models_optimizers_and_schedulers_are_refused(training: Made, tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match="there is no checkpoint"):
        chunkft_fx.load(tmp_path, training.model)
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(CheckpointMismatch, match=r"checkpoint\.pt is in version 1 .* chunkft train --resume"):
        chunkft_fx.load(tmp_path, training.model)
    path = chunkft_fx.save(tmp_path, training.model, training.optimizer, 3)
    refused(path, "no state of a scheduler")
    with pytest.raises(OptimizerMismatch, match="compile"):
        chunkft_fx.save(tmp_path, Net(), training.optimizer, 3)
    for other in (fed().optimizer, torch.optim.SGD(Net().parameters())):
        with pytest.raises(OptimizerMismatch, match="another optimizer"):
            chunkft_fx.save(tmp_path, training.model, other, 3)
    with pytest.raises(OptimizerMismatch, match="give the chunkft_fx optimizer"):
        chunkft_fx.load(path, training.model, torch.optim.SGD(Net().parameters()))
    wide = chunkft_fx.compile(nn.Linear(8, 8), "1GB", chunks=1, backend="eager")
    with pytest.raises(CheckpointMismatch, match="another model: it differs in"):
        chunkft_fx.load(path, wide)
    narrow = fed(torch.bfloat16)
    with pytest.raises(CheckpointMismatch, match=r"run in torch.float32, and this one is in torch.bfloat16"):
        chunkft_fx.load(path, narrow.model, narrow.optimizer)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step": -1}, "step=-1"),
        ({"step": 1.0}, "step=1.0"),
        ({"keep": 0}, "keep=0"),
        ({"extra": {"a": [object()]}}, "0 is a builtins.object"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(
    training: Made, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        save(training, tmp_path, **given)
    assert not list(tmp_path.iterdir())


def test_extra_comes_back_as_it_was(training: Made, tmp_path: Path) -> None:
    extra = {
        "list": [1, 2.5, None, True, "x", float("inf")], "tuple": (1, (2, [3])), "tensor": torch.arange(3), "": {},
        "keys": {1: "a", (2, 3): torch.ones(())}, "dollar": {"$tuple": [1]},
    }  # fmt: skip
    save(training, tmp_path, extra=extra)
    assert_equal(chunkft_fx.load(tmp_path, training.model).extra, extra)


def test_a_model_without_room_for_a_copy_is_saved_at_once(
    training: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save_file, "available_nbytes", lambda: 0)
    with pytest.warns(ChunkFTWarning, match="no room for a copy of the weights"):
        path = save(training, tmp_path, wait=False)
    assert path.is_dir()


def test_a_checkpoint_says_what_it_is(training: Made, tmp_path: Path) -> None:
    record = read_record(save(training, tmp_path))
    assert record["version"] == 2
    assert len(record["plan"]["chunks"]) == 3
    assert json.loads((tmp_path / "checkpoint-3" / "checkpoint.json").read_text())["checkpoint"] == record
    shutil.rmtree(tmp_path / "checkpoint-3")

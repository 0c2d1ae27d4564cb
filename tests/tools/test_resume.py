"""Resuming: only the run that was saved, and only from what is good; the rest changes nothing."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.checkpoints.disk.folders import read_record, write_record
from chunkft_fx.checkpoints.disk.sums import file_sums
from chunkft_fx.checkpoints.saving import Saving, wait_for_saves
from chunkft_fx.errors import CheckpointMismatch, ChunkFTWarning, SaveFailed, TrainingDiverged
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.tools.data.stream import pack
from chunkft_fx.tools.training.checkpoint import require_checkpoint
from chunkft_fx.tools.training.loop import StepInfo, train
from chunkft_fx.tools.training.options import TrainOptions
from chunkft_fx.tools.zoo import tiny
from tests.support.old_checkpoint import old_state, write_old
from tests.support.tiny_text import character_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog. "
OPTIONS = TrainOptions(2, 2, lr=1e-3, save_every=1)


def compiled(dtype: torch.dtype = torch.float32, chunks: int | str = 3, order: str = "ascending") -> CompiledModule:
    model, _ = tiny("llama", dtype)
    return chunkft_fx.compile(model, "1GB", chunks=chunks, interval=1, order=order, backend="eager")


def sequences(text: str = TEXT) -> Tensor:
    return pack([text], character_tokenizer(), 8)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """The folder of a run in each dtype."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        found[dtype] = tmp_path_factory.mktemp("run")
        with pytest.warns(ChunkFTWarning, match="2 steps train 2 of 3 chunks"):
            train(compiled(dtype), sequences(), OPTIONS, out=found[dtype])
    return found


@pytest.fixture
def saved(runs: dict[torch.dtype, Path], tmp_path: Path) -> Callable[..., Path]:
    """Copy the folder of a run, with some entries of its checkpoint changed."""

    def copied(dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        out = tmp_path / "copy"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(runs[dtype], out)
        checkpoint = require_checkpoint(out)
        record = read_record(checkpoint)
        extra = {name: changes.pop(name) for name in ("options", "batches") if name in changes}
        write_record(checkpoint, record | changes | {"extra": record["extra"] | extra})
        return out

    return copied


def refused(folder: Path, message: str, model: CompiledModule | None = None, **arguments: Any) -> None:
    model = model if model is not None else compiled()
    before, random = weights(model), torch.get_rng_state()
    with pytest.raises(CheckpointMismatch, match=message):
        train(model, arguments.pop("text", sequences()), arguments.pop("options", OPTIONS), out=folder, resume=folder)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(0).get_state())
    torch.set_rng_state(random)


def test_other_text_of_the_same_length_is_refused(saved: Callable[..., Path]) -> None:
    refused(saved(), r"other data: text [0-9a-f]{16} \(now", text=sequences(TEXT.replace("fox", "cat")))


@pytest.mark.parametrize(
    ("was", "now"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=["narrower", "wider"]
)
def test_a_run_in_another_dtype_is_refused(saved: Callable[..., Path], was: torch.dtype, now: torch.dtype) -> None:
    refused(saved(was), rf"of a run in {was}, and this one is in {now}.*--dtype", compiled(now))


@pytest.mark.parametrize("step", [-1, 1.0, 1.5, "1", None, True])
def test_a_step_that_is_no_count_is_refused(saved: Callable[..., Path], step: Any) -> None:
    refused(saved(step=step), "no count of steps")


def test_a_run_that_did_more_steps_is_refused(saved: Callable[..., Path]) -> None:
    refused(saved(step=3), "did 3 steps, more than --steps 2")


@pytest.mark.parametrize(
    "change",
    [{"lr": 1e-2}, {"weight_decay": 0.5}, {"accumulate": 2}, {"schedule": "linear"}, {"max_grad_norm": None}]
    + [{"warmup": 1}, {"schedule": "cosine", "schedule_options": {"num_cycles": 2}}],
)
def test_other_options_are_refused_rather_than_ignored(saved: Callable[..., Path], change: dict[str, Any]) -> None:
    options = dataclasses.replace(OPTIONS, **change)
    refused(saved(), rf"saved with {next(iter(change)) if len(change) == 1 else 'schedule_options'} ", options=options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": {}}, "other data"),
        ({"options": {}}, "does not name the options"),
        ({"optimizer": {}}, "does not name what is in its files"),
        ({"optimizer": None}, "does not name what is in its files"),
        ({"states": {"x": {"tensors": {}}}}, "does not name what is in its files"),
        ({"random": {"torch": 1}}, "random numbers"),
    ],
)
def test_a_state_with_something_missing_is_refused(
    saved: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    refused(saved(**changes), message)


def test_a_position_in_the_data_that_is_no_count_is_refused(
    saved: Callable[..., Path], runs: dict[torch.dtype, Path]
) -> None:
    batches = read_record(require_checkpoint(runs[torch.float32]))["extra"]["batches"]
    for position in (-1, 0.5, None):
        refused(saved(batches=batches | {"position": position}), "not a count of batches")


def test_another_order_is_refused(saved: Callable[..., Path]) -> None:
    refused(saved(), r"order ascending \(now descending\)", compiled(order="descending"))


@pytest.mark.parametrize("version", [None, 0, 1, 3])
def test_a_checkpoint_in_another_version_of_the_format_is_refused(saved: Callable[..., Path], version: Any) -> None:
    refused(saved(version=version), rf"version {version} of the format of checkpoints, and .* reads version 2")


def test_a_checkpoint_that_no_run_saved_is_refused(saved: Callable[..., Path]) -> None:
    folder = saved()
    record = read_record(require_checkpoint(folder))
    write_record(require_checkpoint(folder), record | {"extra": None})
    refused(folder, "has no options, batches: no run of chunkft wrote it")


def test_weights_of_another_model_are_refused(saved: Callable[..., Path]) -> None:
    folder = saved()
    checkpoint = require_checkpoint(folder)
    weights = load_file(checkpoint / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, checkpoint / "model.safetensors")
    record = read_record(checkpoint)
    sums = {"model.safetensors": file_sums(checkpoint / "model.safetensors")}
    write_record(checkpoint, record | {"files": record["files"] | sums})
    refused(folder, "another model: it differs in lm_head.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_version_1_is_gone_on_from(
    saved: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    options = dataclasses.replace(OPTIONS, steps=4)
    folder, old = saved(dtype), tmp_path / "old"
    old.mkdir()
    write_old(old / "checkpoint.pt", old_state(require_checkpoint(folder), compiled(dtype)))
    found = []
    for out in (folder, old):
        model = compiled(dtype)
        train(model, sequences(), options, out=out, resume=out)
        found.append(weights(model))
        assert require_checkpoint(out).name == "checkpoint-4"
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())
    refused(old, "did 4 steps, more than --steps 2")


def test_a_finished_run_has_nothing_left_to_do(saved: Callable[..., Path]) -> None:
    for chunks in (3, "auto"):
        model = compiled(chunks=chunks)
        folder = saved()
        report = train(model, sequences(), OPTIONS, out=folder, resume=folder)
        assert report.losses == ()


def test_the_last_step_is_saved_whatever_the_interval(tmp_path: Path) -> None:
    train(compiled(), sequences(), dataclasses.replace(OPTIONS, steps=3, save_every=100), out=tmp_path)
    assert read_record(require_checkpoint(tmp_path))["step"] == 3


def poisoned(model: CompiledModule, at: int, value: float) -> Callable[[StepInfo], None]:
    """After a step, put ``value`` into one weight."""

    def poison(info: StepInfo) -> None:
        if info.step == at:
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] = value

    return poison


def test_a_loss_that_is_not_a_number_leaves_the_last_checkpoint_and_the_weights(tmp_path: Path) -> None:
    model = compiled()
    options = dataclasses.replace(OPTIONS, steps=5, save_every=2)

    def spoil(info: StepInfo) -> None:
        if info.step == 3:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))

    with pytest.raises(TrainingDiverged, match="the loss of step 4 is nan"):
        train(model, sequences(), options, out=tmp_path, on_step=spoil)
    assert read_record(require_checkpoint(tmp_path))["step"] == 2
    spoilt, *others = model.parameters()
    assert spoilt.isnan().all()
    assert all(p.isfinite().all() for p in others)  # the step of that loss changed nothing


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_numbers_are_not_saved(tmp_path: Path, value: float) -> None:
    """The loss of a step cannot show what its own update did."""
    model = compiled()
    with pytest.raises(TrainingDiverged, match=r"weight holds values that are not finite numbers"):
        options = dataclasses.replace(OPTIONS, steps=3)
        train(model, sequences(), options, out=tmp_path, on_step=poisoned(model, 2, value))
    assert read_record(require_checkpoint(tmp_path))["step"] == 1


def test_a_disk_that_fills_up_ends_the_run_with_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(info: StepInfo) -> None:
        if info.step == 2:
            wait_for_saves()
            monkeypatch.setattr(os, "pwrite", write_to_full_disk)

    with pytest.raises(SaveFailed, match="is full"):
        train(compiled(), sequences(), dataclasses.replace(OPTIONS, steps=4), out=tmp_path, on_step=fill)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_failure_of_the_last_save_is_told_beside_what_ends_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(info: StepInfo) -> None:
        if info.step == 1:
            monkeypatch.setattr(os, "pwrite", write_to_full_disk)
        if info.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Saving, "before_step", lambda self: self.finish())
    with pytest.warns(ChunkFTWarning, match="is full"), pytest.raises(KeyboardInterrupt):
        train(compiled(), sequences(), dataclasses.replace(OPTIONS, steps=4), out=tmp_path, on_step=end)


def write_to_full_disk(descriptor: int, data: Any, start: int) -> int:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        return os.write(full, data)
    finally:
        os.close(full)

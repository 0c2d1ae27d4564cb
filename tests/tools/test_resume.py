"""Resuming: only the run that was saved, and only from what is good; the rest changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.errors import CheckpointMismatch, ChunkFTWarning, SaveFailed, TrainingDiverged
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.tools.training import checkpoint_file
from chunkft_fx.tools.training.checkpoint_file import UNFINISHED
from chunkft_fx.tools.training.data import pack
from chunkft_fx.tools.training.folder import CHECKPOINT
from chunkft_fx.tools.training.loop import StepInfo, train
from chunkft_fx.tools.training.options import TrainOptions
from chunkft_fx.tools.zoo import tiny
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
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, dict[str, Any]]:
    """The state in a checkpoint of a run in each dtype."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path_factory.mktemp("run")
        with pytest.warns(ChunkFTWarning, match="2 steps train 2 of 3 chunks"):
            train(compiled(dtype), sequences(), OPTIONS, out=folder)
        found[dtype] = checkpoint_file.read(folder / CHECKPOINT)
    return found


@pytest.fixture
def saved(states: dict[torch.dtype, dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint with some entries changed; gives its folder."""

    def write(dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        checkpoint_file.write(tmp_path / CHECKPOINT, states[dtype] | changes)
        return tmp_path

    return write


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
        ({"model": {}}, "another model: it differs in"),
        ({"options": {}}, "does not name the options"),
        ({"optimizer": {}}, "no optimizer checkpoint"),
        ({"random": torch.zeros(3)}, "random numbers"),
    ],
)
def test_a_state_with_something_missing_is_refused(
    saved: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    refused(saved(**changes), message)


def test_a_position_in_the_data_that_is_no_count_is_refused(
    saved: Callable[..., Path], states: dict[torch.dtype, dict[str, Any]]
) -> None:
    batches = states[torch.float32]["batches"]
    for position in (-1, 0.5, None):
        refused(saved(batches=batches | {"position": position}), "not a count of batches")


def test_another_order_is_refused(saved: Callable[..., Path]) -> None:
    refused(saved(), r"order ascending \(now descending\)", compiled(order="descending"))


@pytest.mark.parametrize("version", [None, 0, 2])
def test_a_checkpoint_in_another_version_of_the_format_is_refused(saved: Callable[..., Path], version: Any) -> None:
    refused(
        saved(version=version), rf"version {version} of the format of checkpoints, and this chunkft reads version 1"
    )


def test_a_checkpoint_without_the_options_of_its_run_is_refused(
    saved: Callable[..., Path], states: dict[torch.dtype, dict[str, Any]]
) -> None:
    folder = saved()
    old = {key: value for key, value in states[torch.float32].items() if key != "options"}
    checkpoint_file.write(folder / CHECKPOINT, old)
    refused(folder, "has no options")


def test_a_finished_run_has_nothing_left_to_do(saved: Callable[..., Path]) -> None:
    for chunks in (3, "auto"):
        model = compiled(chunks=chunks)
        folder = saved()
        report = train(model, sequences(), OPTIONS, out=folder, resume=folder)
        assert report.losses == ()


def test_the_last_step_is_saved_whatever_the_interval(tmp_path: Path) -> None:
    train(compiled(), sequences(), dataclasses.replace(OPTIONS, save_every=100), out=tmp_path)
    assert checkpoint_file.read(tmp_path / CHECKPOINT)["step"] == 2


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
    assert checkpoint_file.read(tmp_path / CHECKPOINT)["step"] == 2
    spoilt, *others = model.parameters()
    assert spoilt.isnan().all()
    assert all(p.isfinite().all() for p in others)  # the step of that loss changed nothing


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_numbers_are_not_saved(tmp_path: Path, value: float) -> None:
    """The loss of a step cannot show what its own update did."""
    model = compiled()
    with pytest.raises(TrainingDiverged, match=r"weight holds values that are not finite numbers"):
        train(model, sequences(), OPTIONS, out=tmp_path, on_step=poisoned(model, 2, value))
    assert checkpoint_file.read(tmp_path / CHECKPOINT)["step"] == 1


def test_a_disk_that_fills_up_ends_the_run_with_the_last_checkpoint(tmp_path: Path) -> None:
    def fill(info: StepInfo) -> None:
        if info.step == 2:
            (tmp_path / f"{CHECKPOINT}{UNFINISHED}").symlink_to("/dev/full")

    with pytest.raises(SaveFailed, match="is full"):
        train(compiled(), sequences(), OPTIONS, out=tmp_path, on_step=fill)
    assert checkpoint_file.read(tmp_path / CHECKPOINT)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]

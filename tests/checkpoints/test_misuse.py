"""Saves that get in each other's way, and what is changed, forgotten or impossible: told, and nothing else is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import chunkft_fx
from chunkft_fx.checkpoints.disk.folders import Target, clear_unfinished
from chunkft_fx.errors import CheckpointMismatch, OptionError, SaveFailed
from tests.checkpoints.test_save import Gate
from tests.support.checkpointed import assert_equal
from tests.support.tiny_trainers import llama, tokenizer


class Plain(nn.Module):
    """A linear layer and a buffer."""

    def __init__(self, buffer: torch.Tensor | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("held", torch.ones(3) if buffer is None else buffer)

    def forward(self, x: torch.Tensor) -> Any:
        return self.linear(x)


class Counting(Plain):
    """It keeps something else than tensors in its state dict."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Opened at the end of a test that fails, too: the process waits for its writers."""
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


def training(model: nn.Module | None = None) -> tuple[Any, Any]:
    compiled = chunkft_fx.compile(model or Plain(), "1GB", coverage="all", backend="eager")
    return compiled, chunkft_fx.AdamW(compiled)


def test_saves_beside_each_other_in_one_folder_leave_each_other_be(tmp_path: Path, gate: Gate) -> None:
    """The second takes what the first is writing for no rest of a killed process; the same name waits for its turn."""
    first, second = training(), training()
    chunkft_fx.save(tmp_path, *first, 1, wait=False)
    chunkft_fx.save(tmp_path, *second, 2, wait=False)
    clear_unfinished(tmp_path)  # as a run of the command line does in its folder
    with pytest.raises(SaveFailed, match="another process, or a save of another model, is writing"):
        chunkft_fx.save(tmp_path, *training(), 1)
    gate.open()
    chunkft_fx.wait_for_saves()
    for number, (model, optimizer) in enumerate((first, second), 1):
        expected = {name: t.clone() for name, t in model.state_dict().items()}
        assert chunkft_fx.load(tmp_path / f"checkpoint-{number}", model, optimizer).step == number
        assert_equal(dict(model.state_dict()), expected)
    chunkft_fx.save(tmp_path, *second, 1)


def test_nothing_that_save_did_not_make_is_replaced(tmp_path: Path) -> None:
    ours = training()
    (tmp_path / "checkpoint-1").mkdir()
    chunkft_fx.save(tmp_path, *ours, 1)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "optimizer.pt").touch()  # Trainer's
    (tmp_path / "checkpoint-3").touch()
    for step in (2, 3):
        with pytest.raises(SaveFailed, match=f"checkpoint-{step} was not written: something that save did not make"):
            chunkft_fx.save(tmp_path, *ours, step)
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_checkpoint_that_was_moved_and_linked_is_replaced_and_removed_as_a_link(tmp_path: Path) -> None:
    ours, runs = training(), tmp_path / "runs"
    kept = chunkft_fx.save(runs, *ours, 1).rename(tmp_path / "kept")
    (runs / "checkpoint-1").symlink_to(kept)
    for _ in range(2):
        chunkft_fx.save(runs, *ours, 1)
    (runs / "checkpoint-2").symlink_to(kept)
    chunkft_fx.save(runs, *ours, 3, keep=1)
    assert [p.name for p in runs.iterdir()] == ["checkpoint-3"]
    assert chunkft_fx.load(kept, *ours).step == 1


def test_another_working_directory_moves_no_checkpoint(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    ours = training()
    path = chunkft_fx.save("runs", *ours, 1, wait=False)
    monkeypatch.chdir(tmp_path / "other")
    gate.open()
    chunkft_fx.wait_for_saves()
    assert chunkft_fx.load(path, *ours).path == tmp_path / "runs" / "checkpoint-1"


def test_settings_and_tokenizer_are_those_of_the_call(tmp_path: Path, gate: Gate) -> None:
    model, words = llama(), tokenizer()
    model.generation_config.max_new_tokens = 7
    before = model.config.to_dict()
    ours = training(model)
    path = chunkft_fx.save(tmp_path, *ours, 1, tokenizer=words, wait=False)
    assert {k: v for k, v in model.config.to_dict().items() if k not in ("architectures", "dtype")} == {
        k: v for k, v in before.items() if k not in ("architectures", "dtype")
    }
    model.config.rms_norm_eps, model.generation_config.max_new_tokens = 0.5, 9
    words.add_tokens(["later"])
    gate.open()
    chunkft_fx.wait_for_saves()
    again = type(model).from_pretrained(path)
    assert again.config.rms_norm_eps == before["rms_norm_eps"]
    assert again.generation_config.max_new_tokens == 7
    assert len(type(words).from_pretrained(path)) == len(words) - 1


def test_a_tokenizer_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "part").touch()
            raise OSError(28, os.strerror(28))

    with pytest.raises(SaveFailed, match="is full"):
        chunkft_fx.save(tmp_path, *training(), 1, tokenizer=Broken())
    assert not list(tmp_path.iterdir())


def recursive() -> Any:
    held: dict[str, Any] = {}
    held["self"] = held
    return held


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"best": "checkpoint-1"}, "best='checkpoint-1' must be the step"),
        ({"best": True}, "best=True must be the step"),
        ({"tokenizer": "gpt2"}, "tokenizer='gpt2' has no save_pretrained"),
        ({"scheduler": "cosine"}, "scheduler='cosine' has no state_dict"),
        ({"extra": {"a": torch.eye(2).to_sparse()}}, "extra.a is a tensor whose values cannot be written"),
        ({"extra": [torch.ones(2, device="meta")]}, "extra.0 is a tensor whose values cannot be written"),
        ({"extra": torch.ones(2, dtype=torch.complex128)}, "extra is a tensor of torch.complex128"),
        ({"extra": recursive()}, "extra holds itself"),
    ],
)
def test_what_cannot_be_saved_is_refused_at_the_call(tmp_path: Path, given: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        chunkft_fx.save(tmp_path, *training(), 1, wait=False, **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Counting, "state_dict.. has '_extra_state', which is a builtins.dict"),
        (lambda: Plain(torch.ones(2, dtype=torch.complex128)), "has 'held', which is a tensor of torch.complex128"),
    ],
)
def test_a_model_with_what_no_file_holds_is_refused_by_name(tmp_path: Path, model: Any, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        chunkft_fx.save(tmp_path, *training(model()), 1, wait=False)
    assert not list(tmp_path.iterdir())


def test_a_conjugate_is_saved_as_its_values(tmp_path: Path) -> None:
    held = torch.tensor([1 + 2j, 3 - 1j]).conj()
    model, optimizer = training(Plain(held))
    chunkft_fx.save(tmp_path, model, optimizer, 1)
    model.held.zero_()
    chunkft_fx.load(tmp_path, model, optimizer)
    assert torch.equal(model.held, torch.tensor([1 - 2j, 3 + 1j]))


def test_weights_that_a_model_never_saves_are_no_other_models(tmp_path: Path) -> None:
    """Marian's sinusoids: transformers leaves them out of every file."""
    from transformers import MarianConfig, MarianMTModel

    sizes: Any = {"d_model": 8, "vocab_size": 12, "max_position_embeddings": 8, "pad_token_id": 0}
    sides = {
        f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")
    }
    ours = training(MarianMTModel(MarianConfig(**sizes, **sides, decoder_start_token_id=0)))
    chunkft_fx.save(tmp_path, *ours, 1)
    assert chunkft_fx.load(tmp_path, *ours).step == 1


def test_the_state_of_another_class_of_scheduler_is_refused(tmp_path: Path) -> None:
    model, optimizer = training()
    chunkft_fx.save(tmp_path, model, optimizer, 1, scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 2))
    other = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    before = other.state_dict()
    with pytest.raises(CheckpointMismatch, match="another scheduler than this CosineAnnealingLR: it has gamma"):
        chunkft_fx.load(tmp_path, model, optimizer, scheduler=other)
    assert other.state_dict() == before


def test_a_folder_that_cannot_be_held_is_taken(tmp_path: Path) -> None:
    """Only what a process writes is held: what a killed one left goes."""
    left = Target(tmp_path / "checkpoint-1")
    left.begin()
    left._let_go()
    Target(tmp_path / "checkpoint-1").begin()

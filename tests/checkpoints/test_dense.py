"""Runs go over from dense training with torch's AdamW to this library's and back, and learn what they would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import chunkft_fx
from chunkft_fx.checkpoints.dense.trainer import decay_groups
from chunkft_fx.errors import CheckpointMismatch, ChunkFTWarning, OptionError
from chunkft_fx.tools.saved import convert
from tests.support.checkpointed import Net

OPTIONS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}
NO_DECAY = ("*norm*",)
WORDS = 40


def llama() -> Any:
    torch.manual_seed(0)
    shape: Any = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=WORDS, tie_word_embeddings=True, pad_token_id=0))


def rows() -> Tensor:
    return torch.randint(3, WORDS, (16, 6), generator=torch.Generator().manual_seed(1))


def steps(model: Any, optimizer: Any, scheduler: Any, which: range) -> None:
    for i in which:
        ids = rows()[2 * i : 2 * i + 2]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def schedule(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 8)


def dense(model: Any) -> tuple[Any, Any]:
    """torch's AdamW with Trainer's groups, and a scheduler."""
    named = dict(model.named_parameters())
    decays, others = decay_groups(model, list(named))
    groups: Any = [{"params": [named[n] for n in decays]}, {"params": [named[n] for n in others], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, **OPTIONS)
    return optimizer, schedule(optimizer)


def ours(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any, Any]:
    model = chunkft_fx.compile(llama().to(dtype), "1GB", chunks=1, backend="eager")
    optimizer = chunkft_fx.AdamW(model, **{"no_decay": NO_DECAY, **OPTIONS, **options})
    return model, optimizer, schedule(optimizer)


def assert_close(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that Trainer saved after 3 steps."""
    folder = tmp_path_factory.mktemp("trainer")
    model = llama()
    quiet: Any = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), max_steps=3, save_steps=3, per_device_train_batch_size=2, **quiet)
    data: Any = [{"input_ids": row, "labels": row} for row in rows()]
    Trainer(model, arguments, train_dataset=data, optimizers=dense(model)).train()
    return folder / "checkpoint-3"


def test_a_run_of_trainer_is_gone_on_from_as_it_would_have_itself(trainers: Path) -> None:
    plain: Any = LlamaForCausalLM.from_pretrained(trainers)
    optimizer, scheduler = dense(plain)
    optimizer.load_state_dict(torch.load(trainers / "optimizer.pt", weights_only=True))
    scheduler.load_state_dict(torch.load(trainers / "scheduler.pt", weights_only=True))
    steps(plain, optimizer, scheduler, range(3, 7))
    model, optimizer, scheduler = ours()
    assert chunkft_fx.load(trainers, model, optimizer, scheduler=scheduler) == chunkft_fx.Loaded(trainers, 3, None)
    steps(model, optimizer, scheduler, range(3, 7))
    assert_close(model, plain)


def test_groups_that_this_optimizer_has_not_are_refused(trainers: Path) -> None:
    model, optimizer, scheduler = ours(no_decay=())
    with pytest.raises(CheckpointMismatch, match="in groups with another weight_decay, this optimizer has them in one"):
        chunkft_fx.load(trainers, model, optimizer, scheduler=scheduler)
    other = chunkft_fx.compile(Net(), "1GB", chunks=1, backend="eager")
    with pytest.raises(CheckpointMismatch, match="it is of another model"):
        chunkft_fx.load(trainers, other, chunkft_fx.AdamW(other))


@pytest.mark.slow
def test_a_state_dict_of_torch_is_gone_on_from() -> None:
    plain = llama()
    named = torch.optim.AdamW(plain.named_parameters(), **OPTIONS)
    steps(plain, named, schedule(named), range(3))
    model = chunkft_fx.compile(llama(), "1GB", chunks=1, backend="eager")
    optimizer = chunkft_fx.AdamW(model, **OPTIONS)
    optimizer.load_state_dict(named.state_dict())
    model.load_state_dict(plain.state_dict())
    steps(plain, named, schedule(named), range(3, 6))
    steps(model, optimizer, schedule(optimizer), range(3, 6))
    assert_close(model, plain)


def test_a_run_is_gone_on_from_by_dense_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer, scheduler = ours()
    steps(model, optimizer, scheduler, range(3))
    chunkft_fx.save(tmp_path, model, optimizer, 3, scheduler=scheduler)
    steps(model, optimizer, scheduler, range(3, 7))
    out = tmp_path / "dense"
    convert.command(tmp_path, out)
    assert "behind step 3" in capsys.readouterr().out
    plain: Any = LlamaForCausalLM.from_pretrained(out)
    others = dense(plain)
    others[0].load_state_dict(torch.load(out / "optimizer.pt", weights_only=True))
    others[1].load_state_dict(torch.load(out / "scheduler.pt", weights_only=True))
    steps(plain, *others, range(3, 7))
    assert_close(plain, model)
    with pytest.raises(OptionError, match="is there already"):
        convert.command(tmp_path, out)


@pytest.mark.slow
def test_trainer_itself_resumes_from_what_is_converted(tmp_path: Path) -> None:
    model, optimizer, scheduler = ours()
    steps(model, optimizer, scheduler, range(3))
    chunkft_fx.save(tmp_path, model, optimizer, 3, scheduler=scheduler)
    convert.command(tmp_path, tmp_path / "dense", batch_size=2)
    plain = llama()
    quiet: Any = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), max_steps=5, per_device_train_batch_size=2, **quiet)
    data: Any = [{"input_ids": row, "labels": row} for row in rows()]
    trainer = Trainer(plain, arguments, train_dataset=data, optimizers=dense(plain))
    trainer.train(resume_from_checkpoint=str(tmp_path / "dense"))
    assert trainer.state.global_step == 5
    optimizer_state: Any = trainer.optimizer
    assert {float(s["step"]) for s in optimizer_state.state.values()} == {5.0}


@pytest.mark.slow
@pytest.mark.parametrize("state_dtype", ["float32", "8bit"])
def test_masters_become_the_weights(tmp_path: Path, state_dtype: str) -> None:
    model, optimizer, scheduler = ours(torch.bfloat16, master="remainder", state_dtype=state_dtype)
    steps(model, optimizer, scheduler, range(3))
    path = chunkft_fx.save(tmp_path, model, optimizer, 3, scheduler=scheduler)
    convert.command(path, tmp_path / "dense")
    plain: Any = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    masters = [optimizer.state_dict()["state"][i]["master"] for i in range(len(list(model.parameters())))]
    order = [n for g in optimizer.param_groups for n in g["param_names"]]
    named = dict(plain.named_parameters())
    assert all(torch.equal(named[n], m) for n, m in zip(order, masters, strict=True))
    others = dense(plain)
    others[0].load_state_dict(torch.load(tmp_path / "dense" / "optimizer.pt", weights_only=True))
    steps(plain, *others, range(3, 5))


def test_what_needs_no_converting_is_told(trainers: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is a checkpoint of Trainer's, which resumes from it as it is"):
        convert.command(trainers, tmp_path / "dense")
    with pytest.raises(OptionError, match="batch_size=0 must be"):
        convert.command(trainers, tmp_path / "dense", 0)
    assert not list(tmp_path.iterdir())


def test_what_dense_training_cannot_have_is_told(tmp_path: Path) -> None:
    net = chunkft_fx.compile(Net(), "1GB", chunks=3, interval=1, backend="eager")
    path = chunkft_fx.save(tmp_path, net, chunkft_fx.AdamW(net), 0)
    with pytest.raises(CheckpointMismatch, match=r"has no config\.json: it is of no transformers model"):
        convert.command(path, tmp_path / "dense")
    path = chunkft_fx.save(tmp_path / "sgd", net, chunkft_fx.SGD(net, lr=0.1), 0)
    with pytest.raises(CheckpointMismatch, match="has no states of AdamW"):
        convert.command(path, tmp_path / "dense")
    cut = chunkft_fx.compile(llama(), "1GB", chunks=8, interval=1, order="ascending", backend="eager")
    optimizer = chunkft_fx.AdamW(cut, no_decay=NO_DECAY)
    for s in cut.active_slices():
        s.grad = torch.ones_like(s.weight())
    optimizer.step()
    path = chunkft_fx.save(tmp_path / "cut", cut, optimizer, 1)
    with pytest.warns(ChunkFTWarning, match="parts of .* parameters"):
        convert.command(path, tmp_path / "dense")

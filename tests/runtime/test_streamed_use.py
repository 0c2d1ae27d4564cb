"""What surrounds training, with weights in host memory: generate, save_pretrained, and transformers' Trainer."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from threading import RLock
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.errors import OptionError
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.module.routing import through_compiled
from chunkft_fx.runtime.session import Session
from chunkft_fx.tools.zoo import tiny
from tests.support.equivalence import loss_of
from tests.support.forced_streaming import streaming


def compiled(model: nn.Module, **options: Any) -> CompiledModule:
    return chunkft_fx.compile(copy.deepcopy(model), "64GB", backend="eager", **{"interval": 1, **options})


def stream(module: CompiledModule) -> None:
    """Move every weight to host memory, as a plan would at the first training batch."""
    module.residency.settle(module.residency.parameters, 2)


def greedy(model: Any, ids: Tensor, count: int) -> Tensor:
    found: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    return found


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_generate_runs_the_compiled_call_while_weights_are_streamed(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny(family)
    ids = batch(2, 4, 1)["input_ids"]
    wanted = greedy(model.eval(), ids, 5)
    calls: list[Session] = []
    call = Session.__call__

    def counted(self: Session, *arguments: Any) -> Any:
        calls.append(self)
        return call(self, *arguments)

    monkeypatch.setattr(Session, "__call__", counted)
    streamed = compiled(model.train(), chunks=2)
    with streaming("all"):
        assert torch.equal(greedy(streamed.eval(), ids, 5), wanted)
        assert not calls  # every weight is on the device yet: the plain model
        stream(streamed)
        assert torch.equal(greedy(streamed.eval(), ids, 5), wanted)
    assert len(calls) == 5  # a call a token
    assert "forward" not in vars(streamed._model)


def test_a_failing_generate_leaves_the_model_as_it_was() -> None:
    model, batch = tiny("llama")
    streamed = compiled(model, chunks=2)
    stream(streamed)
    with pytest.raises(ValueError, match="max_new_tokens"):
        greedy(streamed, batch(2, 4, 1)["input_ids"], 0)
    assert "forward" not in vars(streamed._model)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_an_encoder_decoder_on_cuda_says_why_it_cannot_generate(family: str) -> None:
    """Its encoder runs by itself, and would read weights that lie in host memory."""
    model, batch = tiny(family)
    ids = batch(2, 4, 1)["input_ids"]
    away: Any = SimpleNamespace(away=lambda: {"a.weight"}, device=torch.device("cuda"))
    generate = through_compiled(model.generate, model, model.forward, away, RLock())  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="raise the budget") if family == "t5" else contextlib.nullcontext():
        generate(ids, max_new_tokens=1)
    assert "forward" not in vars(model)


def test_a_model_without_generate_has_none() -> None:
    model, _ = tiny("mlp")
    assert not hasattr(compiled(model, chunks=2), "generate")


def test_save_pretrained_writes_the_trained_weights(tmp_path: Path) -> None:
    model, batch = tiny("vit")
    streamed = compiled(model, chunks=2)
    optimizer = chunkft_fx.AdamW(streamed, lr=1e-2)
    with streaming("mixed"):
        loss_of(streamed(**batch(2, 12, 0))).backward()
        optimizer.step()
        streamed.save_pretrained(tmp_path)
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path).state_dict()
    for name, value in streamed.state_dict().items():
        assert torch.equal(value, loaded[name]), name
    assert any(not torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_zero_grad_of_the_model_reaches_the_slices() -> None:
    """Trainer and plain loops call it on the model, not on the optimizer."""
    model, batch = tiny("mlp")
    module = compiled(model, chunks=1)
    module.zero_grad()  # before any slice exists
    loss_of(module(**batch(2, 4, 0))).backward()
    module.zero_grad(set_to_none=False)
    assert all(s.grad is not None and not s.grad.any() for s in module.active_slices())
    module.zero_grad()
    assert all(s.grad is None for s in module.active_slices())


def test_trainer_trains_as_a_plain_loop_does(tmp_path: Path) -> None:
    """Several steps on one chunk, so that gradients left over from one step would be seen in the next."""
    model, batch = tiny("gpt2", dtype=torch.float64)
    rows = [{name: value[0] for name, value in batch(1, 12, seed).items()} for seed in range(4)]
    plain = compiled(model, chunks=2, interval=2)
    optimizer = chunkft_fx.AdamW(plain, lr=1e-2)
    for row in rows:
        loss_of(plain(**{name: value[None] for name, value in row.items()})).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)  # as Trainer does
        optimizer.step()
        optimizer.zero_grad()
    with streaming("all"):
        streamed = compiled(model, chunks=2, interval=2)
        ours = chunkft_fx.AdamW(streamed, lr=1e-2)
        constant = torch.optim.lr_scheduler.LambdaLR(ours, lambda step: 1.0)
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=1, max_steps=4, save_strategy="no", report_to=[], use_cpu=True,
            train_sampling_strategy="sequential", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = transformers.Trainer(streamed, arguments, train_dataset=rows, optimizers=(ours, constant))
        trainer.train()
    for (name, a), b in zip(streamed.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)

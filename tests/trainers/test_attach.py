"""attach: what it gives a trainer, and the trainers, steps and versions that it refuses or warns of."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments

import chunkft_fx
from chunkft_fx.errors import ChunkFTWarning, OptimizerMismatch, OptionError, OutsideGradient
from chunkft_fx.module.module import training_of
from chunkft_fx.trainers import versions
from chunkft_fx.trainers.log import TrainerLog
from tests.module.test_trainer import padded, rows, t5, uneven
from tests.support.tiny_trainers import arguments, assert_all_trained, assert_same_losses, llama, losses

EAGER: Any = {"backend": "eager", "coverage": "all"}


def trainer(folder: Path, model: Any = None, kind: Any = Trainer, **given: Any) -> Any:
    args = arguments(TrainingArguments, folder, **given)
    return kind(llama() if model is None else model, args, train_dataset=rows(), eval_dataset=rows(4))


def test_a_trainer_trains_as_it_does_without(tmp_path: Path) -> None:
    """By its own arguments: rate, betas, eps, and decay of some parameters only."""
    asked = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "learning_rate": 3e-3}
    plain, ours = trainer(tmp_path / "plain", **asked), trainer(tmp_path / "ours", **asked)
    compiled = chunkft_fx.attach(ours, "1GB", **EAGER)
    assert ours.model is compiled
    for t in (plain, ours):
        t.train()
        t.evaluate()
    assert_same_losses(ours, plain)
    assert_all_trained(compiled, llama())
    found, expected = ours.optimizer.optimizer, plain.optimizer.optimizer
    for a, b in zip(found.param_groups, expected.param_groups, strict=True):
        assert [p.shape for p in a["params"]] == [p.shape for p in b["params"]]
        for option in ("betas", "eps", "weight_decay", "lr", "initial_lr"):
            assert a[option] == b[option]
    assert [g["weight_decay"] for g in found.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("is_pinned", [True, False])
def test_no_step_waits_for_a_batch_from_pinned_memory(tmp_path: Path, is_pinned: bool) -> None:
    ours = trainer(tmp_path)
    ours.args.dataloader_pin_memory = is_pinned  # a run on the CPU turns it off
    chunkft_fx.attach(ours, "1GB", **EAGER)
    assert ours.get_train_dataloader()._non_blocking is is_pinned


class Broken(Trainer):  # type: ignore[misc, unused-ignore]
    """Some of its losses are NaN or infinite, their gradients are not."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(*args, **kwargs)
        wrong = {0: float("nan"), 3: float("inf"), 4: float("nan")}.get(self.state.global_step)
        return found if wrong is None or kwargs.get("return_outputs") else found + wrong


@pytest.mark.parametrize(("is_filtered", "accumulated"), [(True, 1), (True, 2), (False, 1)])
def test_losses_are_filtered_as_by_the_plain_trainer(tmp_path: Path, is_filtered: bool, accumulated: int) -> None:
    asked = {"logging_nan_inf_filter": is_filtered, "gradient_accumulation_steps": accumulated}
    given = {"kind": Broken, "max_steps": 6, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 3} | asked
    plain, ours = trainer(tmp_path / "plain", **given), trainer(tmp_path / "ours", **given)
    chunkft_fx.attach(ours, "1GB", **EAGER)
    for t in (plain, ours):
        t.train()
    assert losses(plain).isfinite().all() == is_filtered
    torch.testing.assert_close(losses(ours), losses(plain), rtol=0, atol=1e-5, equal_nan=True)
    assert ours.args.logging_nan_inf_filter is is_filtered


def test_no_step_of_a_trainer_looks_at_its_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To look at it is to wait for the GPU."""
    look, looks = torch.Tensor.__bool__, []

    def noted(self: torch.Tensor) -> bool:
        looks.append(sys._getframe(1).f_code.co_name)
        return look(self)

    monkeypatch.setattr(torch.Tensor, "__bool__", noted)
    plain, ours = trainer(tmp_path / "plain", max_steps=3), trainer(tmp_path / "ours", max_steps=3)
    chunkft_fx.attach(ours, "1GB", **EAGER)
    for t, times in ((plain, 6), (ours, 0)):
        looks.clear()
        t.train()
        assert looks.count("_run_epoch") == times


def test_a_seq2seq_trainer_trains_as_it_does_without(tmp_path: Path) -> None:
    ran = []
    for name in ("plain", "ours"):
        args = arguments(Seq2SeqTrainingArguments, tmp_path / name)
        t: Any = Seq2SeqTrainer(t5(), args, train_dataset=rows())
        if name == "ours":
            chunkft_fx.attach(t, "1GB", **EAGER)
        t.train()
        ran.append(t)
    assert_same_losses(ran[1], ran[0])
    assert_all_trained(ran[1].model, t5())


def test_noise_of_neftune_is_traced_with_lengths_that_vary(tmp_path: Path) -> None:
    """The same noise as without attach, and none once training is over."""
    ran = []
    for name in ("plain", "ours"):
        args = arguments(TrainingArguments, tmp_path / name, neftune_noise_alpha=5.0, max_steps=6)
        t: Any = Trainer(llama(), args, train_dataset=uneven(), data_collator=padded)
        if name == "ours":
            chunkft_fx.attach(t, "1GB", **EAGER)
        t.train()
        ran.append(t)
    assert_same_losses(ran[1], ran[0])
    assert_all_trained(ran[1].model, llama())
    assert not ran[1].model.get_input_embeddings()._forward_hooks


def test_options_of_the_optimizer_and_of_compile_are_handed_on(tmp_path: Path) -> None:
    ours = trainer(tmp_path / "a", max_grad_norm=0.0)
    compiled = chunkft_fx.attach(ours, "1GB", optimizer={"update": "backward", "eps": 1e-5}, **EAGER)
    assert (ours.optimizer.spec.updates, ours.optimizer.param_groups[0]["eps"]) == ("backward", 1e-5)
    ours.train()
    assert_all_trained(compiled, llama())
    other = trainer(tmp_path / "b", optim="sgd")
    compiled = chunkft_fx.attach(other, "1GB", optimizer=lambda m: chunkft_fx.SGD(m, lr=0.1), backend="eager", chunks=3)
    assert len(compiled.plan.chunks) == 3
    assert isinstance(other.optimizer, chunkft_fx.SGD)


def test_the_log_says_what_is_trained_and_how_fast(tmp_path: Path) -> None:
    ours = trainer(tmp_path, eval_strategy="steps", eval_steps=1)
    chunkft_fx.attach(ours, "1GB", backend="eager", coverage="one", chunks=3, interval=1)
    heard: list[dict[str, float]] = []
    ours.add_callback(_Hears(heard))
    ours.train()
    logs = [e for e in ours.state.log_history if "loss" in e]
    assert [(e["chunkft/chunk"], e["chunkft/chunks"]) for e in logs] == [(1, 3), (2, 3), (0, 3), (1, 3)]
    assert all(e["chunkft/budget_bytes"] == 10**9 and e["chunkft/tokens_per_second"] > 0 for e in logs)
    assert not any("chunkft/chunk" in e for e in ours.state.log_history if "loss" not in e)
    assert [e["chunkft/chunk"] for e in heard if "loss" in e] == [1, 2, 0, 1]


class _Hears(TrainerLog):
    """A callback behind the others, as those that report are."""

    def __init__(self, heard: list[dict[str, float]]) -> None:
        super().__init__()
        self.heard = heard

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **_: Any) -> None:
        self.heard.append(dict(logs))


def test_tokens_are_those_of_training_calls() -> None:
    log, model = TrainerLog(), nn.Linear(1, 1)
    batch = {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
    log._count(model, (), batch)
    with torch.no_grad():
        log._count(model, (), batch)
    model.eval()
    log._count(model, (), batch)
    assert log._tokens == 10


def test_the_callback_alone_refuses_a_plain_model(tmp_path: Path) -> None:
    args = arguments(TrainingArguments, tmp_path)
    with pytest.raises(OptionError, match="a plain LlamaForCausalLM"):
        Trainer(llama(), args, train_dataset=rows(), callbacks=[TrainerLog()]).train()


class _NoGradient(Trainer):  # type: ignore[misc, unused-ignore]
    """Its loss depends on nothing that the model computed."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        return torch.ones((), requires_grad=True) * 2


class _Outside(Trainer):  # type: ignore[misc, unused-ignore]
    """Its loss goes past the compiled call, as TRL's fused head does."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        hidden = model.base_model(inputs["input_ids"]).last_hidden_state
        return torch.nn.functional.cross_entropy(
            (hidden @ model.lm_head.weight.T).flatten(0, 1), inputs["labels"].flatten()
        )


@pytest.mark.parametrize(("kind", "says"), [(_NoGradient, "does not depend on"), (_Outside, "none came through")])
def test_a_step_that_no_backward_of_the_model_led_to_is_refused(tmp_path: Path, kind: Any, says: str) -> None:
    ours = trainer(tmp_path, kind=kind)
    compiled = chunkft_fx.attach(ours, "1GB", **EAGER)
    with pytest.raises(OutsideGradient, match=says):
        ours.train()
    for p, q in zip(compiled.parameters(), llama().parameters(), strict=True):
        assert torch.equal(p, q)


def _with_adapter() -> Any:
    """A model with a module of PEFT's, as far as one can tell without it."""
    model = llama()
    kind = type("LoraModel", (nn.Module,), {"__module__": "peft.tuners.lora.model"})
    model.add_module("adapter", kind())
    return model


class _OwnOptimizer(Trainer):  # type: ignore[misc, unused-ignore]
    def create_optimizer(self, model: Any = None) -> Any:
        raise AssertionError


def _with_scheduler(folder: Path) -> Any:
    t = trainer(folder)
    t.lr_scheduler = object()
    return t


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "no trainer": (lambda _: llama(), {}, "which is no transformers Trainer"),
    "compiled before": (lambda f: trainer(f, chunkft_fx.compile(llama(), "1GB")), {}, "was compiled before"),
    "adapters": (lambda f: trainer(f, _with_adapter()), {}, r"PEFT adapters \(LoraModel\)"),
    "a scheduler": (_with_scheduler, {}, "a scheduler of its own"),
    "model_init": (
        lambda f: Trainer(args=arguments(TrainingArguments, f), model_init=lambda: llama()), {}, "model_init",
    ),
    "torch_compile": (lambda f: trainer(f, torch_compile=True), {}, "torch_compile=True"),
    "another optim": (lambda f: trainer(f, optim="sgd"), {}, 'optim="sgd" asks for another'),
    "an optimizer in a way of its own": (lambda f: trainer(f, kind=_OwnOptimizer), {}, "create_optimizer"),
    "a class of optimizers": (trainer, chunkft_fx.AdamW, "AdamW is a class, which would go by its own defaults"),
    "no optimizer": (trainer, "adamw", "optimizer='adamw' is neither a dictionary"),
    "weights converted to be evaluated": (lambda f: trainer(f, bf16_full_eval=True), {}, "bf16_full_eval"),
    "clipping behind updates": (trainer, {"update": "backward"}, "max_grad_norm=1.0"),
    "accumulation behind updates": (
        lambda f: trainer(f, gradient_accumulation_steps=2, max_grad_norm=0.0), {"update": "backward"},
        "gradient_accumulation_steps=2",
    ),
}  # fmt: skip


def test_an_optimizer_that_would_not_train_the_model_is_refused(tmp_path: Path) -> None:
    other = chunkft_fx.AdamW(chunkft_fx.compile(llama(), "1GB", **EAGER))
    for made in (None, other, torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)):
        ours = trainer(tmp_path)

        def make(_: Any, made: Any = made) -> Any:
            return made

        with pytest.raises(OptimizerMismatch, match="is not an optimizer of chunkft_fx for the compiled model"):
            chunkft_fx.attach(ours, "1GB", optimizer=make, **EAGER)
        assert ours.optimizer is None
        chunkft_fx.attach(ours, "1GB", **EAGER)


class _Interrupts(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Once, before the first step."""

    is_done = False

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.is_done:
            self.is_done = True
            raise KeyboardInterrupt


def test_a_training_after_an_interrupted_one_counts_tokens_once(tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    ours.add_callback(_Interrupts())
    compiled = chunkft_fx.attach(ours, "1GB", **EAGER)
    with pytest.raises(KeyboardInterrupt):
        ours.train()
    ours.train()
    assert not compiled._forward_pre_hooks


def test_its_checkpoints_are_gone_on_from_at_their_place_in_the_sweep(tmp_path: Path) -> None:
    """Those that Trainer writes by `load`, and those of `save`, which takes Trainer's wrapped optimizer."""
    turns: Any = {"backend": "eager", "chunks": 3, "interval": 1, "coverage": "one"}
    ours = trainer(tmp_path, save_strategy="steps", save_steps=4)
    compiled = chunkft_fx.attach(ours, "1GB", **turns)
    ours.train()
    assert ours.optimizer is not training_of(compiled, "test").optimizer
    paths = tmp_path / "checkpoint-4", chunkft_fx.save(tmp_path / "own", compiled, ours.optimizer, 4)
    for path in paths:
        again = chunkft_fx.compile(llama(1), "1GB", **turns)
        optimizer = chunkft_fx.AdamW(again, no_decay=("*norm*",))
        assert chunkft_fx.load(path, again, optimizer).step == 4
        assert again.schedule.state_dict() == compiled.schedule.state_dict()
        assert all(torch.equal(p, q) for p, q in zip(again.parameters(), compiled.parameters(), strict=True))


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(tmp_path: Path, case: str) -> None:
    make, optimizer, says = REFUSED[case]
    t = make(tmp_path)
    model, forward = getattr(t, "model", None), getattr(getattr(t, "model", None), "forward", None)
    with pytest.raises(OptionError, match=says):
        chunkft_fx.attach(t, "1GB", optimizer=optimizer, **EAGER)
    assert getattr(t, "model", None) is model
    assert getattr(model, "forward", None) == forward
    assert getattr(t, "optimizer", None) is None


def test_an_unknown_version_of_trl_is_warned_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.new_class("SFTTrainer", (Trainer,))
    other.__module__ = "trl.trainer.sft_trainer"
    t = trainer(tmp_path, kind=other)
    versions.warn_of_version(t)  # the installed one is tested
    monkeypatch.setattr(trl, "__version__", "9.9.0")
    versions.warn_of_version(trainer(tmp_path))  # not TRL's
    with pytest.warns(ChunkFTWarning, match=r"trl 9\.9\.0 was not tested"):
        versions.warn_of_version(t)
    versions.warn_of_version(t)


def test_the_tested_versions_are_those_that_tests_install() -> None:
    root = Path(__file__).parents[2]
    pinned = next(n for n in (root / "constraints.txt").read_text().splitlines() if n.startswith("trl=="))
    assert pinned.removeprefix("trl==").rsplit(".", 1)[0] in versions.TESTED_TRL
    table = (root / "docs" / "versions.md").read_text()
    assert all(f"| {version} |" in table for version in versions.TESTED_TRL)

"""transformers' Trainer trains, evaluates, saves and loads a compiled model as it does the plain one."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    SchedulerType,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import chunkft_fx
from chunkft_fx.errors import OptimizerMismatch
from chunkft_fx.plan.chunk import Slice
from tests.support.reference_loop import Reference

WORDS = 40
WAYS = {
    "coverage all": {"coverage": "all"},
    "one chunk": {"coverage": "one", "chunks": 1},
    "chunks in turn": {"coverage": "one", "chunks": 3, "interval": 1},
}
DENSE = ["coverage all", "one chunk"]


def llama() -> nn.Module:
    """Its head is its embedding."""
    torch.manual_seed(0)
    shape: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, vocab_size=WORDS, tie_word_embeddings=True, pad_token_id=0)
    return LlamaForCausalLM(config)


def t5() -> nn.Module:
    torch.manual_seed(0)
    shape: Any = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(**shape, vocab_size=WORDS, pad_token_id=0, decoder_start_token_id=0))


def rows(count: int = 8) -> Any:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, WORDS, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def compiled_of(model: nn.Module, how: str) -> Any:
    return chunkft_fx.compile(model, "1GB", backend="eager", **WAYS[how])  # type: ignore[arg-type]


def options(folder: Path, **given: Any) -> dict[str, Any]:
    asked = {"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    return {"output_dir": str(folder), **asked, **quiet, **given}


def adamw_of(model: Any) -> Any:
    if issubclass(type(model), chunkft_fx.CompiledModule):
        return chunkft_fx.AdamW(model, lr=1e-2, weight_decay=0.1)
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def trainer(model: nn.Module, folder: Path, **given: Any) -> Any:
    return Trainer(
        model,
        TrainingArguments(**options(folder, **given)),
        train_dataset=rows(),
        eval_dataset=rows(4),
        optimizers=(adamw_of(model), None),
    )


def losses(ran: Any) -> Tensor:
    found = [e[k] for e in ran.state.log_history for k in ("loss", "eval_loss") if k in e]
    assert found
    return torch.tensor(found)


def assert_same_losses(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(losses(ours), losses(theirs), rtol=0, atol=1e-5)


def assert_same_weights(ours: Any, theirs: Any, atol: float = 0.0) -> None:
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("how", DENSE)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_training_evaluation_and_prediction_are_the_plain_models(tmp_path: Path, how: str, smoothing: float) -> None:
    plain = trainer(llama(), tmp_path / "plain", label_smoothing_factor=smoothing)
    ours = trainer(compiled_of(llama(), how), tmp_path / "ours", label_smoothing_factor=smoothing)
    assert ours.label_names == plain.label_names == ["labels"]
    for t in (plain, ours):
        t.train()
        t.evaluate()
    assert_same_losses(ours, plain)
    got, want = ours.predict(rows(4)), plain.predict(rows(4))
    torch.testing.assert_close(torch.tensor(got.predictions), torch.tensor(want.predictions), rtol=0, atol=1e-4)
    assert (got.label_ids == want.label_ids).all()
    assert got.metrics["test_loss"] == pytest.approx(want.metrics["test_loss"], abs=1e-5)


def test_what_it_saves_is_a_folder_that_from_pretrained_loads(tmp_path: Path) -> None:
    compiled = compiled_of(llama(), "coverage all")
    ours = trainer(compiled, tmp_path / "ours")
    ours.train()
    ours.save_model(str(tmp_path / "saved"))
    assert {"config.json", "generation_config.json", "model.safetensors"} <= {
        p.name for p in (tmp_path / "saved").iterdir()
    }
    loaded: Any = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert_same_weights(loaded, compiled)


def test_the_best_model_comes_back_at_the_end(tmp_path: Path) -> None:
    asked = {
        "load_best_model_at_end": True,
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 2,
        "eval_steps": 2,
        "greater_is_better": True,  # the first checkpoint, whose loss is the highest: the last would come back anyway
        "metric_for_best_model": "eval_loss",
    }
    compiled = compiled_of(llama(), "coverage all")
    plain, ours = trainer(llama(), tmp_path / "plain", **asked), trainer(compiled, tmp_path / "ours", **asked)
    for t in (plain, ours):
        t.train()
    assert Path(ours.state.best_model_checkpoint).name == "checkpoint-2"
    assert_same_losses(ours, plain)
    assert_same_weights(compiled, LlamaForCausalLM.from_pretrained(tmp_path / "ours" / "checkpoint-2"))
    assert_same_weights(compiled, plain.model, atol=1e-5)
    assert compiled.lm_head.weight is compiled.model.embed_tokens.weight


def test_it_resumes_where_a_checkpoint_was_saved(tmp_path: Path) -> None:
    asked = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(compiled_of(llama(), "coverage all"), tmp_path / "whole", **asked)
    whole.train()
    again = trainer(compiled_of(llama(), "coverage all"), tmp_path / "again", **asked)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_losses(again, whole)
    assert_same_weights(again.model, whole.model, atol=1e-6)


def test_gradient_checkpointing_is_noted_and_left_to_the_plan(tmp_path: Path) -> None:
    is_renamed = "activation_checkpointing" in inspect.signature(TrainingArguments).parameters  # transformers 5.23
    asked = {"activation_checkpointing" if is_renamed else "gradient_checkpointing": True}
    plain, compiled = llama(), compiled_of(llama(), "coverage all")
    theirs, ours = trainer(plain, tmp_path / "plain", **asked), trainer(compiled, tmp_path / "ours", **asked)
    for t in (theirs, ours):
        t.train()
    assert compiled.supports_gradient_checkpointing
    assert_same_losses(ours, theirs)


def test_an_optimizer_can_be_asked_for_as_a_factory(tmp_path: Path) -> None:
    plain = trainer(llama(), tmp_path / "plain")
    compiled = compiled_of(llama(), "coverage all")
    kind = (lambda: chunkft_fx.AdamW, {"lr": 1e-2, "weight_decay": 0.1})
    ours: Any = Trainer(
        compiled,
        TrainingArguments(**options(tmp_path / "ours")),
        train_dataset=rows(),
        optimizer_cls_and_kwargs=kind,
    )
    for t in (plain, ours):
        t.train()
    assert_same_losses(ours, plain)


def test_a_class_in_place_of_the_factory_is_refused_by_what_to_write(tmp_path: Path) -> None:
    ours: Any = Trainer(
        compiled_of(llama(), "coverage all"),
        TrainingArguments(**options(tmp_path)),
        train_dataset=rows(),
        optimizer_cls_and_kwargs=(chunkft_fx.AdamW, {"lr": 1e-2}),
    )
    with pytest.raises(OptimizerMismatch, match=r"\(lambda: chunkft_fx\.AdamW, \{\.\.\.\}\)"):
        ours.train()


def test_seq2seq_trainer_predicts_with_generate(tmp_path: Path) -> None:
    made: list[tuple[Any, Any]] = []
    for model in (t5(), compiled_of(t5(), "coverage all")):
        folder = tmp_path / str(len(made))
        generation = GenerationConfig(max_length=7, num_beams=2, decoder_start_token_id=0, pad_token_id=0)
        arguments = Seq2SeqTrainingArguments(
            **options(folder), predict_with_generate=True, generation_config=generation
        )
        t: Any = Seq2SeqTrainer(
            model, arguments, train_dataset=rows(), eval_dataset=rows(4), optimizers=(adamw_of(model), None)
        )
        t.train()
        t.evaluate()
        made.append((t, t.predict(rows(4))))
    (plain, want), (ours, got) = made
    assert_same_losses(ours, plain)
    assert want.predictions.shape[1] > 2
    assert (got.predictions == want.predictions).all()


def test_two_models_of_one_class_train_beside_each_other(tmp_path: Path) -> None:
    first, second = compiled_of(llama(), "coverage all"), compiled_of(copy.deepcopy(llama()), "one chunk")
    assert type(first) is type(second)
    one, two = trainer(first, tmp_path / "one"), trainer(second, tmp_path / "two")
    one.train(), two.train()
    assert_same_losses(one, two)


class SlicedAdamW(torch.optim.Optimizer):
    """AdamW written out for a plain model, of which each step updates the slices of the next chunk in turn.

    Gradients are clipped to ``max_norm`` by the norm of those slices alone, as a Trainer does with a compiled model.
    """

    def __init__(self, model: nn.Module, chunks: Sequence[Sequence[Slice]], max_norm: float) -> None:
        super().__init__(model.parameters(), {"lr": 1e-2})
        self.reference, self.chunks, self.max_norm, self.steps = Reference(model, decay=0.1), chunks, max_norm, 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        active = self.chunks[self.steps % len(self.chunks)]
        self.steps += 1
        self.reference.lr = self.param_groups[0]["lr"]
        if self.max_norm:
            self.reference.scale(min(1.0, self.max_norm / (self.reference.slice_norm(active) + 1e-6)))
        self.reference.step(active)


class Pair:
    """A compiled model in one trainer after another, beside a plain one; each time from the same weights."""

    def __init__(self, folder: Path, how: str, model: Any = llama) -> None:
        self.folder, self.how, self.model = folder, how, model
        self.compiled = compiled_of(model(), how)

    def optimizers(self, plain: nn.Module, max_norm: float) -> tuple[Any, Any]:
        if self.how != "chunks in turn":
            return adamw_of(self.compiled), adamw_of(plain)
        ours = chunkft_fx.AdamW(self.compiled, lr=1e-2, weight_decay=0.1, schedule_by="step")
        self.compiled.activate(0)
        return ours, SlicedAdamW(plain, [c.slices for c in self.compiled.plan.chunks], max_norm)

    def train(self, collator: Any = None, **given: Any) -> tuple[Any, Any]:
        """Both trainers, after they ran; every tensor of both models has changed."""
        collator = collator or functools.partial(padded, least=6)
        plain = self.model()
        before = {name: p.detach().clone() for name, p in plain.named_parameters()}
        self.compiled.load_state_dict(before, strict=False)
        max_norm = given.pop("max_grad_norm", 1.0)
        ran = []
        for model, optimizer in zip((self.compiled, plain), self.optimizers(plain, max_norm), strict=True):
            norm = 0.0 if isinstance(optimizer, SlicedAdamW) else max_norm
            arguments = TrainingArguments(**options(self.folder, max_steps=6, max_grad_norm=norm, **given))
            t = Trainer(
                model,
                arguments,
                train_dataset=uneven(),
                eval_dataset=rows(2),
                data_collator=collator,
                optimizers=(optimizer, None),
            )
            t.train()
            for name, p in model.named_parameters():
                assert not torch.equal(p, before[name]), f"{name} was not trained"
            ran.append(t)
        return ran[0], ran[1]


# What a scheduler needs beside the warm-up, by name; the others need nothing.
SCHEDULERS = {
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-3},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
}
# They go by a metric, which Trainer gives them after an evaluation.
BY_METRIC = ("reduce_lr_on_plateau", "greedy")


@pytest.mark.parametrize("how", WAYS)
def test_each_scheduler_with_warm_up(tmp_path: Path, how: str) -> None:
    pair = Pair(tmp_path, how)
    for kind in SchedulerType:
        own = {"lr_scheduler_kwargs": SCHEDULERS[kind.value]} if kind.value in SCHEDULERS else {}
        if kind.value in BY_METRIC:
            own = {"eval_strategy": "steps", "eval_steps": 1}
        ours, plain = pair.train(lr_scheduler_type=kind.value, warmup_steps=2, **own)
        rates = [[e["learning_rate"] for e in t.state.log_history if "learning_rate" in e] for t in (ours, plain)]
        assert rates[0] == rates[1]
        assert_same_losses(ours, plain)


def uneven(count: int = 8) -> Any:
    """Rows of different lengths."""
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, WORDS, (4 + i % 3,), generator=generator) for i in range(count)]
    return [{"input_ids": row, "labels": row} for row in ids]


def padded(batch: Sequence[Any], least: int = 0) -> dict[str, Tensor]:
    """Rows of a batch filled up to the longest, or to ``least`` tokens, with labels that do not count."""
    ids = [row["input_ids"] for row in batch]
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    full = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask, full = (nn.functional.pad(t, (0, max(0, least - t.shape[1]))) for t in (mask, full))
    return {"input_ids": full, "attention_mask": mask, "labels": full.masked_fill(mask == 0, -100)}


OPTIONS: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipping": {"max_grad_norm": 0.05},
    "neftune": {"neftune_noise_alpha": 5.0},
    "lengths": {"train_sampling_strategy": "group_by_length"},
}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_is_the_plain_trainers(tmp_path: Path, option: str, how: str) -> None:
    collator = padded if option == "lengths" else None
    ours, plain = Pair(tmp_path, how).train(collator, **OPTIONS[option])
    assert_same_losses(ours, plain)


@pytest.mark.parametrize("how", WAYS)
def test_bf16_is_the_plain_trainers(tmp_path: Path, how: str) -> None:
    ours, plain = Pair(tmp_path, how).train(bf16=True)
    torch.testing.assert_close(losses(ours), losses(plain), rtol=0, atol=5e-3)

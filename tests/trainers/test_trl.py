"""TRL's trainers with a compiled model attached: losses, metrics and weights are those of the plain trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import chunkft_fx
from chunkft_fx.errors import OptionError, OutsideGradient
from chunkft_fx.runtime.session import Session
from tests.support.reference_loop import Reference
from tests.support.tiny_trainers import (
    answers,
    arguments,
    assert_all_trained,
    assert_same_losses,
    llama,
    preferences,
    texts,
    tokenizer,
)

# TRL calls them by names that transformers has new ones for
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")

DENSE: Any = {"backend": "eager", "coverage": "all"}
ONE: Any = {"backend": "eager", "coverage": "one", "chunks": 1}
TURNS: Any = {"backend": "eager", "coverage": "one", "chunks": 3, "interval": 1}
# What TRL computes from log-probabilities and the head beside the loss.
METRICS = (
    "entropy", "mean_token_accuracy", "num_tokens", "grad_norm", "logits/chosen", "logits/rejected", "logps/chosen",
    "rewards/margins",
)  # fmt: skip

SFT: dict[str, dict[str, Any]] = {
    "padded": {"pad_to_multiple_of": 16},
    "packed": {"packing": True, "max_length": 16},
    "completion only": {"completion_only_loss": True, "pad_to_multiple_of": 16},
    "dft": {"loss_type": "dft", "pad_to_multiple_of": 16},
}


def sft(folder: Path, case: str = "padded", **given: Any) -> Any:
    data = answers() if case == "completion only" else texts()
    args = arguments(SFTConfig, folder, **{**SFT[case], **given})
    return SFTTrainer(llama(), args, train_dataset=data, eval_dataset=data, processing_class=tokenizer())


def dpo(folder: Path, **given: Any) -> Any:
    args = arguments(DPOConfig, folder, pad_to_multiple_of=16, **given)
    reference = None if args.precompute_ref_log_probs else llama(1)
    return DPOTrainer(
        llama(), reference, args=args, train_dataset=preferences(), eval_dataset=preferences(4),
        processing_class=tokenizer(),
    )  # fmt: skip


def assert_same_run(ours: Any, plain: Any) -> None:
    """Losses, metrics and weights are the same, and everything was trained."""
    assert_same_losses(ours, plain)
    for a, b in zip(ours.state.log_history, plain.state.log_history, strict=True):
        for name in METRICS:
            if name in b:
                assert a[name] == pytest.approx(b[name], abs=1e-4), name
    for (name, p), q in zip(ours.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4, msg=name)
    assert_all_trained(ours.model, llama())


@pytest.mark.parametrize("how", [DENSE, ONE], ids=["coverage all", "one chunk"])
@pytest.mark.parametrize("case", SFT)
def test_sft_is_the_plain_trainers(tmp_path: Path, case: str, how: Any) -> None:
    plain, ours = sft(tmp_path / "plain", case), sft(tmp_path / "ours", case)
    chunkft_fx.attach(ours, "1GB", **how)
    for t in (plain, ours):
        t.train()
        if case == "padded":
            t.evaluate()
    assert_same_run(ours, plain)


def test_a_step_takes_one_forward_from_the_first_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the outputs that TRL's forward gives, the loss among them, its trainers take log-probabilities."""
    begin, expected = Session.begin, []

    def noted(self: Session, batches: Any, tangents: frozenset[str]) -> Any:
        expected.append(tangents)
        return begin(self, batches, tangents)

    monkeypatch.setattr(Session, "begin", noted)
    ours = sft(tmp_path, max_steps=2)
    chunkft_fx.attach(ours, "1GB", **DENSE)
    ours.train()
    assert len(expected) == 2


@pytest.mark.parametrize("precomputed", [False, True])
def test_dpo_is_the_plain_trainers(tmp_path: Path, precomputed: bool) -> None:
    given = {"precompute_ref_log_probs": precomputed}
    plain, ours = dpo(tmp_path / "plain", **given), dpo(tmp_path / "ours", **given)
    chunkft_fx.attach(ours, "1GB", **DENSE)
    for t in (plain, ours):
        t.train()
        t.evaluate()
    assert_same_run(ours, plain)
    if not precomputed:
        for p, q in zip(ours.ref_model.parameters(), llama(1).parameters(), strict=True):
            assert torch.equal(p, q)


def test_the_reference_counts_against_the_budget(tmp_path: Path) -> None:
    ours = dpo(tmp_path)
    nbytes = sum(p.numel() * 4 for p in ours.ref_model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in ours.ref_model.buffers())
    compiled = chunkft_fx.attach(ours, 10**9, **DENSE)
    assert compiled.plan.budget_bytes == 10**9 - nbytes - buffers
    with pytest.raises(OptionError, match=r"the reference model takes .* precompute_ref_log_probs=True"):
        chunkft_fx.attach(dpo(tmp_path), nbytes, **DENSE)


def test_chunks_in_turn_are_those_of_a_loop(tmp_path: Path) -> None:
    """Against the plain trainer's own losses and gradients, of which a loop applies a chunk's slices a step."""
    ours = sft(tmp_path / "ours", max_steps=6, max_grad_norm=0.0, lr_scheduler_type="constant")
    compiled = chunkft_fx.attach(ours, "1GB", **TURNS)
    chunks = [c.slices for c in compiled.plan.chunks]
    assert len(chunks) == 3
    plain = sft(tmp_path / "plain", max_steps=6, max_grad_norm=0.0, lr_scheduler_type="constant")
    plain.optimizer = torch.optim.SGD(plain.model.parameters(), lr=0.0)
    spared = {n for n, _ in plain.model.named_parameters()} - set(plain.get_decay_parameter_names(plain.model))
    references = [Reference(plain.model, decay=0.1), Reference(plain.model, decay=0.0)]
    steps = iter(range(6))

    def update(*_: Any) -> None:
        active = chunks[next(steps) % 3]
        for reference, is_spared in zip(references, (False, True), strict=True):
            reference.step([s for s in active if (s.name in spared) == is_spared])

    plain.optimizer.register_step_post_hook(update)
    for t in (plain, ours):
        t.train()
    assert_same_losses(ours, plain)
    assert_all_trained(compiled, llama())


def test_packed_documents_do_not_attend_to_each_other(tmp_path: Path) -> None:
    """Another first document changes nothing in the second."""
    ours = sft(tmp_path, "packed")
    compiled = chunkft_fx.attach(ours, "1GB", **DENSE)
    batch = next(iter(ours.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0]
    assert len(starts) > 2  # several documents in a row
    other = batch["input_ids"].clone()
    other[0, : starts[1]] = 5
    compiled.eval()
    with torch.no_grad():
        found = [
            compiled(**{**batch, "input_ids": i}, fused_lm_head=True).log_probs[0] for i in (batch["input_ids"], other)
        ]
    torch.testing.assert_close(found[0][starts[1] :], found[1][starts[1] :])
    assert not torch.equal(found[0][: starts[1] - 1], found[1][: starts[1] - 1])


def test_grpo_is_the_plain_trainers(tmp_path: Path) -> None:
    """Generation and training; a large eps, because where rewards are equal gradients are rounding alone."""
    ran = []
    llama().save_pretrained(tmp_path / "model")
    for name in ("plain", "ours"):
        args = arguments(
            GRPOConfig, tmp_path / name, per_device_train_batch_size=4, num_generations=2, max_completion_length=5,
            beta=0.1, adam_epsilon=1e-2,
        )  # fmt: skip
        t = GRPOTrainer(
            type(llama()).from_pretrained(tmp_path / "model"), reward_funcs=_kinds_of_words, args=args,
            train_dataset=preferences().select_columns("prompt"), processing_class=tokenizer(),
        )  # fmt: skip
        if name == "ours":
            chunkft_fx.attach(t, "1GB", **DENSE)
        t.train()
        ran.append(t)
    plain, ours = ran
    assert_same_losses(ours, plain)
    assert_all_trained(ours.model, llama())


def _kinds_of_words(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(c.split()))) for c in completions]


def test_a_compiled_model_that_was_not_attached_is_refused_at_its_first_step(tmp_path: Path) -> None:
    """TRL's head goes past the compiled call; nothing would be trained."""
    compiled: Any = chunkft_fx.compile(llama(), "1GB", **DENSE)
    args = arguments(SFTConfig, tmp_path)
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-3)
    t = SFTTrainer(compiled, args, train_dataset=texts(), processing_class=tokenizer(), optimizers=(optimizer, None))
    with pytest.raises(OutsideGradient, match=r"chunkft_fx\.attach"):
        t.train()
    for p, q in zip(compiled.parameters(), llama().parameters(), strict=True):
        assert torch.equal(p, q)

"""The chunked head inside compiled models: no logits in training, the same gradients, one pass over the logits."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import chunkft_fx
from chunkft_fx.head import operators as head
from chunkft_fx.head.missing_logits import MissingLogits
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.tools.inspect import dense_gradients
from chunkft_fx.tools.zoo import tiny
from tests.support.equivalence import assert_same_gradients, loss_of, relative_error, smallest_budget
from tests.support.equivalence import dense_gradients as plain_gradients
from tests.support.forced_policy import force

FAMILIES = ("llama", "bert")
CLASSES = 160


def compiled_tiny(family: str, chunks: int = 3, **options: Any) -> tuple[nn.Module, Any, CompiledModule]:
    model, batch = tiny(family)
    options = {"budget": "64GB", "backend": "eager", "interval": 1, **options}
    return model, batch, chunkft_fx.compile(copy.deepcopy(model), chunks=chunks, **options)


def heads(compiled: CompiledModule) -> list[tuple[Any, bool]]:
    """The operators of the chunked head in the current program, and whether each is in a backward."""
    found = []
    for variant in compiled.program.variants:
        for module, is_backward in ((variant.forward, False), (variant.backward, True)):
            if module is not None:
                targets = [n.target for n in module.graph.nodes]
                found += [(t, is_backward) for t in targets if t in (head.forward, head.backward, head.grad)]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_there_except_in_training(family: str) -> None:
    model, batch, compiled = compiled_tiny(family)
    inputs = batch(2, 12, 0)
    expected = model(**inputs)
    result = compiled(**inputs)
    assert isinstance(result.logits, MissingLogits)
    torch.testing.assert_close(result.loss, expected.loss)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, expected.logits)
    compiled.eval()
    torch.testing.assert_close(compiled(**inputs).logits, model.eval()(**inputs).logits)
    compiled.train()
    assert isinstance(compiled(**inputs).logits, MissingLogits)


def test_a_model_that_never_asks_for_its_mode_returns_logits_in_evaluation() -> None:
    """Nothing in such a model tells training from evaluation, so nothing guards what was captured for one."""
    _, batch, compiled = compiled_tiny("mlp")
    inputs = batch(4, 0, 0)
    assert isinstance(compiled(**inputs)[1], MissingLogits)
    compiled.eval()
    assert isinstance(compiled(**inputs)[1], Tensor)
    compiled.train()
    assert isinstance(compiled(**inputs)[1], MissingLogits)


def test_logits_are_returned_if_asked_for() -> None:
    model, batch, compiled = compiled_tiny("llama", return_logits=True)
    torch.testing.assert_close(compiled(**batch(2, 12, 0)).logits, model(**batch(2, 12, 0)).logits)
    assert heads(compiled) == []


@pytest.mark.parametrize(("family", "chunks", "tokens"), [("llama", 17, 5), ("gpt2", 25, 5), ("bert", 17, 24)])
def test_slices_of_the_head_equal_the_dense_gradient(
    family: str, chunks: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks that cut the head's weight (tied but for llama), in blocks that do and do not divide the tokens."""
    monkeypatch.setattr(head, "LOGITS_NBYTES", tokens * CLASSES * 4)
    model, batch, compiled = compiled_tiny(family, chunks)
    loss, dense = plain_gradients(model, batch(2, 12, 0))
    cut = [k for k, c in enumerate(compiled.plan.chunks) if any(s.size == CLASSES and not s.is_whole for s in c.slices)]
    assert len(cut) >= 2
    for k in cut:
        compiled.activate(k)
        found = compiled(**batch(2, 12, 0)).loss
        torch.testing.assert_close(found, loss)
        found.backward()
        for s in compiled.active_slices():
            expected = dense[s.name] if s.slice.is_whole else dense[s.name].narrow(s.dim, s.start, s.length)
            assert s.grad is not None
            assert relative_error(s.grad, expected, 1e-4 * float(dense[s.name].norm())) <= 2e-5, s.slice
    assert not dense_gradients(compiled)


@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.2, marks=pytest.mark.slow)])
def test_a_budget_without_room_for_a_block_splits_it(monkeypatch: pytest.MonkeyPatch, dropout: float) -> None:
    """The plan splits the head, the programs do as it says, and gradients are the plain model's."""
    classes = 3000
    monkeypatch.setattr(head, "LOGITS_NBYTES", 64 * classes * 4)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=classes,
        use_cache=False, attention_dropout=dropout,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = LlamaForCausalLM(config).train(), torch.randint(0, classes, (4, 32))
    inputs = {"input_ids": ids, "labels": ids}
    ample = chunkft_fx.compile(copy.deepcopy(model), "64GB", chunks=3, interval=1, backend="eager")
    ample(**inputs)
    assert ample.plan.policy.head_split == 1
    tight = chunkft_fx.compile(
        copy.deepcopy(model), smallest_budget(model, inputs, 3), chunks=3, interval=1, backend="eager"
    )
    assert_same_gradients(tight, model, inputs, 1e-4)
    assert tight.plan.policy.head_split > 1
    assert f"1/{tight.plan.policy.head_split}" in str(tight.plan)
    used = {n.kwargs["split"] for v in tight.program.variants for n in v.forward.graph.nodes if head.is_head(n)}
    assert used == {tight.plan.policy.head_split}
    assert json.loads(tight.plan.to_json())["policy"]["head_split"] == tight.plan.policy.head_split


def test_slices_equal_the_dense_gradient_in_float64() -> None:
    model, batch = tiny("bert", dtype=torch.float64)
    compiled = chunkft_fx.compile(copy.deepcopy(model), "64GB", chunks=3, interval=1, backend="eager")
    assert_same_gradients(compiled, model, batch(2, 12, 0), 1e-10)
    assert heads(compiled)


def test_inductor_compiles_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the blocks that it takes by itself, and in half of these."""
    monkeypatch.setattr(head, "LOGITS_NBYTES", 12 * CLASSES * 4)
    model, batch, compiled = compiled_tiny("llama", chunks=1, backend="inductor")
    assert_same_gradients(compiled, model, batch(2, 12, 0), 1e-4)
    assert heads(compiled) == [(head.grad, False)]
    force(compiled, head_split=2)
    compiled.zero_grad()
    assert_same_gradients(compiled, model, batch(2, 12, 1), 1e-4)
    assert compiled.program.variants[-1].demand.policy.head_split == 2


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("chunks", [1, 17])
def test_logits_are_computed_once_and_never_saved(chunks: int, recompute: bool) -> None:
    """One operator in the forward of the head, none in a backward, also where activations are recomputed."""
    _, batch, compiled = compiled_tiny("llama", chunks)
    inputs = batch(4, 20, 0)
    compiled(**inputs)
    if recompute:
        force(compiled, save_from=len(compiled.program.variants))
    for k in {0, chunks - 2, chunks - 1}:
        compiled.activate(max(k, 0))
        compiled(**inputs).loss.backward()
        assert heads(compiled) == [(head.grad, False)]
        assert compiled.program.variants[-1].demand.policy.recompute == recompute
        for variant in compiled.program.variants:
            for module in filter(None, (variant.forward, variant.backward)):
                values = [n.meta.get("val") for n in module.graph.nodes]
                assert all(v.numel() < 80 * CLASSES for v in values if isinstance(v, Tensor))


def test_the_loss_alone_needs_no_gradient_operator() -> None:
    """Under ``no_grad`` in training mode, and in evaluation, the model is captured without the head's operators."""
    _, batch, compiled = compiled_tiny("llama")
    with torch.no_grad():
        compiled(**batch(2, 12, 0))
    assert heads(compiled) == []


def test_other_lengths_do_not_capture_anew() -> None:
    model, batch, compiled = compiled_tiny("llama", chunks=1)
    for length in (12, 9, 17, 31, 8):
        loss, dense = plain_gradients(model, batch(2, length, 0))
        found = compiled(**batch(2, length, 0)).loss
        torch.testing.assert_close(found, loss)
        found.backward()
        for s in compiled.active_slices():
            assert s.grad is not None
            assert relative_error(s.grad, dense[s.name], 1e-6) <= 2e-5, s.slice
            s.grad = None
    assert len(compiled._training.sessions) == 2


@pytest.mark.parametrize("items", [7, torch.tensor(7)], ids=["int", "tensor"])
def test_number_of_items_in_the_batch_keeps_its_meaning(items: Any) -> None:
    """transformers' way to average over an accumulated batch: a sum, divided by a given number."""
    model, batch, compiled = compiled_tiny("llama")
    inputs = batch(2, 12, 0) | {"num_items_in_batch": items}
    torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss)
    assert_same_gradients(compiled, model, inputs, 2e-5)
    assert heads(compiled)


def test_all_labels_ignored_is_nan_as_in_torch() -> None:
    model, batch, compiled = compiled_tiny("bert")
    inputs = batch(2, 12, 0)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = loss_of(compiled(**inputs))
    assert loss.isnan() and loss_of(model(**inputs)).isnan()
    loss.backward()
    gradients = [s.grad for s in compiled.active_slices() if s.grad is not None]
    assert gradients and not any(g.any() for g in gradients)


def test_gradients_accumulate_over_scaled_losses() -> None:
    """A loss divided for accumulation reaches the saved gradients as their tangent."""
    model, batch, compiled = compiled_tiny("gpt2", chunks=1)
    for seed in (0, 1):
        for m in (model, compiled):
            (loss_of(m(**batch(2, 12, seed))) / 3).backward()
    for s in compiled.active_slices():
        gradient = model.get_parameter(s.name).grad
        assert gradient is not None and s.grad is not None
        torch.testing.assert_close(s.grad, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-9)

"""Hooks of transformers are traced: outputs asked for come out of compiled calls, embeddings need no mark."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import chunkft_fx
from chunkft_fx import CompiledModule
from chunkft_fx.errors import UnsupportedGraph
from tests.support.equivalence import assert_same_gradients

IDS = torch.arange(12).view(2, 6)
BATCH: dict[str, Any] = {"input_ids": IDS, "labels": IDS, "use_cache": False}
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20,
}  # fmt: skip


def llama(**options: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager", **options)).train()


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=4)).train()


def own(model: nn.Module) -> CompiledModule:
    return chunkft_fx.compile(copy.deepcopy(model), "1GB", chunks=1, backend="eager")


def assert_same(compiled: CompiledModule, model: nn.Module, name: str, **options: Any) -> None:
    """Values and gradients, with a loss on every one of the outputs ``name``."""
    results = [m(**BATCH, **options) for m in (model, compiled)]
    expected, found = (r[name] for r in results)
    assert len(found) == len(expected) >= 2
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a)
    for result, outputs in zip(results, (expected, found), strict=True):
        (result.loss + sum(o.pow(2).mean() for o in outputs)).backward()
    for s in compiled.active_slices():
        dense = model.get_parameter(s.name).grad
        assert s.grad is not None
        assert dense is not None
        torch.testing.assert_close(s.grad, dense)


@pytest.mark.parametrize("name", ["hidden_states", "attentions"])
def test_outputs_asked_for_at_the_first_call(name: str) -> None:
    model = llama()
    compiled = own(model)
    assert_same(compiled, model, name, **{f"output_{name}": True})
    assert compiled(**BATCH).get(name) is None
    assert [r.label for r in compiled._training.sessions[0].programs.outline.regions][1:3] == [
        "model.layers.0",
        "model.layers.1",
    ]


def test_outputs_asked_for_later() -> None:
    model = llama()
    compiled = own(model)
    assert compiled(**BATCH).get("hidden_states") is None
    assert_same(compiled, model, "hidden_states", output_hidden_states=True)


def test_outputs_asked_for_by_the_configuration() -> None:
    model = llama(output_hidden_states=True)
    assert_same(own(model), model, "hidden_states")


def test_router_logits_of_a_mixture_of_experts() -> None:
    model = mixtral()
    assert_same(own(model), model, "router_logits", output_router_logits=True)


def test_a_model_that_is_not_asked_stays_as_it_was() -> None:
    """Hooks cannot be pickled."""
    model = llama()
    compiled = own(model)
    compiled(**BATCH)
    pickle.dumps(compiled)
    assert not any(m._forward_hooks for m in compiled.modules())
    assert_same_gradients(compiled, model, BATCH, 1e-5)


class Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.linear(x).sum()


def test_another_reason_not_to_trace_is_still_an_error() -> None:
    with pytest.raises(UnsupportedGraph, match="one graph"):
        own(Unsupported())(torch.ones(2))


def test_marked_embeddings_that_are_frozen_or_evaluated() -> None:
    """What activation checkpointing hooks onto embeddings changes no gradient, and goes as it came."""
    model: Any = llama()
    model.get_input_embeddings().weight.requires_grad_(False)
    compiled: Any = own(model)
    for m in (model, compiled):
        m.enable_input_require_grads()
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(**BATCH).loss, model.eval()(**BATCH).loss)
    assert_same_gradients(compiled.train(), model.train(), BATCH, 1e-5)
    plain = compiled._model
    assert plain.get_input_embeddings()(IDS).requires_grad  # as long as no trace runs, the hook is what it was
    compiled.disable_input_require_grads()
    assert not plain.get_input_embeddings()(IDS).requires_grad

"""Models that ask for recomputation themselves: the plan decides what is recomputed, and gradients stay the same."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import chunkft_fx
from chunkft_fx.module.module import CompiledModule
from tests.support.equivalence import assert_same_gradients, smallest_budget

IDS = torch.randint(0, 30, (2, 16), generator=torch.Generator().manual_seed(0))


# since torch 2.13; before there is no such wish to forget
BUDGET = getattr(torch.autograd.graph, "region_activation_memory_budget", contextlib.nullcontext)


class Block(nn.Module):
    """Attention without dropout, which torch counts as random, in front of a dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.project, self.dropout = nn.LayerNorm(8), nn.Linear(8, 24), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t[:, None] for t in self.project(self.norm(x)).chunk(3, -1))
        return x + self.dropout(functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])


class Model(nn.Module):
    """``reentrant=None``: without checkpoints."""

    def __init__(self, dropout: float, reentrant: bool | None) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 8), nn.Linear(8, 30)
        self.layers = nn.ModuleList(Block(dropout) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


class WholeCheckpointed(Model):
    """One checkpoint around everything, the loss included."""

    def forward(self, ids: Tensor) -> Tensor:
        loss: Tensor = checkpoint(super().forward, ids, use_reentrant=False)
        return loss


class Budgeted(Model):
    """A part of it is under torch's own budget for activations, which wants all of a graph or nothing."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        with BUDGET(0.3):
            x = self.layers[0](x)
        return functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def labels(compiled: CompiledModule) -> list[str]:
    return [region.label for region in compiled._training.sessions[-1].programs.outline.regions]


CASES = [(d, r) for d in (0.0, 0.3) for r in (None, False, True)]
QUICK = {(0.3, False), (0.0, True)}


@pytest.mark.parametrize(
    ("dropout", "reentrant"), [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES]
)
def test_the_plan_decides_what_is_recomputed(dropout: float, reentrant: bool | None) -> None:
    """Under the smallest budget everything, under an ample one nothing, whatever is checkpointed."""
    model, batch = Model(dropout, reentrant), {"ids": IDS}
    for budget, recomputes in ((smallest_budget(model, batch, 2), True), (10**9, False)):
        compiled = chunkft_fx.compile(copy.deepcopy(model), budget, chunks=2, interval=1, backend="eager")
        assert_same_gradients(compiled, model, batch, 1e-5)
        assert any(v.demand.policy.recompute for v in compiled.variants) == recomputes
        assert labels(compiled) == ["input", "layers.0", "layers.1", "layers.2", "output"]


def test_a_checkpoint_around_the_whole_model_gives_the_same_gradient() -> None:
    model = WholeCheckpointed(0.3, False)
    compiled = chunkft_fx.compile(copy.deepcopy(model), "1GB", chunks=2, interval=1, backend="eager")
    assert_same_gradients(compiled, model, {"ids": IDS}, 1e-5)
    assert labels(compiled)[1:4] == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.slow
def test_inductor_compiles_recomputed_dropout_beside_attention_without_it() -> None:
    model = Model(0.3, False)
    budget = smallest_budget(model, {"ids": IDS}, 2)
    compiled = chunkft_fx.compile(copy.deepcopy(model), budget, chunks=2, interval=1)
    assert_same_gradients(compiled, model, {"ids": IDS}, 1e-4)
    assert any(v.demand.policy.recompute for v in compiled.variants)


def test_torchs_budget_for_a_part_of_a_model_changes_nothing() -> None:
    model = Budgeted(0.0, None)
    compiled = chunkft_fx.compile(copy.deepcopy(model), "1GB", chunks=2, interval=1, backend="eager")
    loss = compiled(IDS)
    loss.backward()
    plain = copy.deepcopy(model)
    reference = functional.cross_entropy(plain.head(plain.layers[0](plain.embed(IDS))).flatten(0, 1), IDS.flatten())
    reference.backward()
    torch.testing.assert_close(loss, reference)
    for s in compiled.active_slices():
        dense = plain.get_parameter(s.name).grad
        assert s.grad is not None
        assert dense is not None
        torch.testing.assert_close(s.grad, dense if s.slice.is_whole else dense.narrow(s.dim, s.start, s.length))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_torchs_budget_for_the_process_changes_nothing(share: float) -> None:
    model = Model(0.3, None)
    with functorch_config.patch(activation_memory_budget=share):
        compiled = chunkft_fx.compile(copy.deepcopy(model), "1GB", chunks=2, interval=1, backend="eager")
        assert_same_gradients(compiled, model, {"ids": IDS}, 1e-5)
        assert not any(v.demand.policy.recompute for v in compiled.variants)


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_transformers_model_with_gradient_checkpointing_compiles(reentrant: bool) -> None:
    config: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 40}
    model = LlamaForCausalLM(LlamaConfig(**config, num_hidden_layers=2, attention_dropout=0.2)).train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    batch = {"input_ids": IDS, "labels": IDS, "use_cache": False}
    compiled = chunkft_fx.compile(copy.deepcopy(model), "1GB", chunks=2, interval=1, backend="eager")
    assert_same_gradients(compiled, model, batch, 1e-5)
    assert labels(compiled)[1:3] == ["model.layers.0", "model.layers.1"]

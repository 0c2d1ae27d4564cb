"""The slices of all chunks together are the dense gradient, for every family of models."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch

import chunkft_fx
from chunkft_fx.tools.inspect import dense_gradients
from chunkft_fx.tools.zoo import FAMILIES, tiny
from tests.support.equivalence import assert_same_gradients, smallest_budget

WITH_DROPOUT = tuple(name for name in FAMILIES if name not in ("llama", "qwen3", "mistral", "mlp", "cnn"))


# Families that differ most, held to every number of chunks by default; tracing T5 and ViT takes longest.
MOST_CUT = ("llama", "gpt2", "cnn", "mlp")
LONGEST = ("t5", "vit")
# Near relatives of llama, gpt2 and bert: to compile their kernels takes minutes on a machine that has none of them.
RELATED = ("mistral", "qwen3", "opt", "roberta")
CUTS = [
    pytest.param(family, chunks, marks=() if chunks == 3 or family in MOST_CUT else pytest.mark.slow)
    for family in FAMILIES
    for chunks in (1, 3, 7)
]


def shortest(families: Iterable[str], slow: Sequence[str] = LONGEST) -> list[Any]:
    """The families, those that take longest marked slow."""
    return [pytest.param(f, marks=pytest.mark.slow if f in slow else ()) for f in families]


@pytest.mark.parametrize(("family", "chunks"), CUTS)
def test_eager_slices_equal_dense_gradient(family: str, chunks: int) -> None:
    model, batch = tiny(family, dtype=torch.float64)
    model.train()
    compiled = chunkft_fx.compile(copy.deepcopy(model), "64GB", chunks=chunks, interval=1, backend="eager")
    assert_same_gradients(compiled, model, batch(2, 12, 0), 1e-9)
    assert not dense_gradients(compiled)


@pytest.mark.parametrize("family", shortest(WITH_DROPOUT))
def test_dropout_agrees_under_a_fixed_seed(family: str) -> None:
    model, batch = tiny(family, dtype=torch.float64, dropout=0.2)
    model.train()
    compiled = chunkft_fx.compile(copy.deepcopy(model), "64GB", chunks=3, interval=1, backend="eager")
    assert_same_gradients(compiled, model, batch(2, 12, 0), 1e-9)


@pytest.mark.parametrize("family", shortest(FAMILIES, LONGEST + RELATED))
def test_inductor_slices_equal_dense_gradient(family: str) -> None:
    model, batch = tiny(family)
    model.train()
    compiled = chunkft_fx.compile(copy.deepcopy(model), "64GB", chunks=3, interval=1)
    assert_same_gradients(compiled, model, batch(2, 12, 0), 1e-4)
    assert not dense_gradients(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [1, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_inductor_slices_equal_dense_gradient_at_other_cuts(family: str, chunks: int) -> None:
    model, batch = tiny(family)
    model.train()
    compiled = chunkft_fx.compile(copy.deepcopy(model), "64GB", chunks=chunks, interval=1)
    assert_same_gradients(compiled, model, batch(2, 12, 0), 1e-4)
    assert not dense_gradients(compiled)


def test_inductor_dropout_agrees_under_a_fixed_seed() -> None:
    model, batch = tiny("gpt2", dropout=0.2)
    model.train()
    compiled = chunkft_fx.compile(copy.deepcopy(model), "64GB", chunks=3, interval=1)
    assert_same_gradients(compiled, model, batch(2, 12, 0), 1e-4)


@pytest.mark.parametrize(
    ("family", "dropout"),
    [
        ("llama", 0.0),
        ("gpt2", 0.2),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in (("llama", 0.2), ("gpt2", 0.0))),
    ],
)
def test_recomputed_activations_give_the_same_gradient(family: str, dropout: float) -> None:
    """A budget just above the smallest feasible one forces every region to recompute, dropout included."""
    model, batch = tiny(family, dtype=torch.float64, dropout=dropout)
    model.train()
    smallest = smallest_budget(model, batch(4, 32, 0), 3)
    compiled = chunkft_fx.compile(copy.deepcopy(model), smallest, chunks=3, interval=1, backend="eager")
    assert_same_gradients(compiled, model, batch(4, 32, 0), 1e-9)
    assert compiled.plan.policy.save_from > 0
    assert any(v.demand.policy.recompute for v in compiled.variants)


@pytest.mark.parametrize("frozen", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_frozen_parameters_are_left_out(frozen: str) -> None:
    model, batch = tiny("llama", dtype=torch.float64)
    model.get_parameter(frozen).requires_grad_(False)
    compiled = chunkft_fx.compile(copy.deepcopy(model), "64GB", chunks=3, interval=1, backend="eager")
    assert frozen not in {s.name for c in compiled.plan.chunks for s in c.slices}
    assert_same_gradients(compiled, model, batch(2, 12, 0), 1e-9)

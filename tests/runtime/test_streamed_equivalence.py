"""With weights in host memory the slices of all chunks together are still the dense gradient, for every family."""

from __future__ import annotations

from typing import Any

import pytest

from chunkft_fx.tools.zoo import FAMILIES
from tests.runtime import test_equivalence as resident
from tests.support.forced_streaming import SHARES, streaming

# test_weight_streaming has the language models; here what differs from them, and tied weights, half streamed.
QUICK = {("gpt2", 3, "mixed"), ("vit", 1, "all"), ("cnn", 3, "all"), ("mlp", 7, "mixed")}
QUICK_INDUCTOR = {("mlp", 3, "all")}


def cases(*choices: tuple[Any, ...], quick: set[Any]) -> list[Any]:
    """Every combination with every share of streamed weights; those not in ``quick`` are slow."""
    combined: list[tuple[Any, ...]] = [()]
    for values in (*choices, tuple(SHARES)):
        combined = [(*c, v) for c in combined for v in values]
    return [pytest.param(*c, marks=() if c in quick else pytest.mark.slow) for c in combined]


@pytest.mark.parametrize(("family", "chunks", "share"), cases(FAMILIES, (1, 3, 7), quick=QUICK))
def test_eager_slices_equal_dense_gradient(family: str, chunks: int, share: str) -> None:
    with streaming(share):
        resident.test_eager_slices_equal_dense_gradient(family, chunks)


@pytest.mark.parametrize(("family", "share"), cases(resident.WITH_DROPOUT, quick=set()))
def test_dropout_agrees_under_a_fixed_seed(family: str, share: str) -> None:
    with streaming(share):
        resident.test_dropout_agrees_under_a_fixed_seed(family)


@pytest.mark.parametrize(("family", "chunks", "share"), cases(FAMILIES, (1, 3, 7), quick=QUICK_INDUCTOR))
def test_inductor_slices_equal_dense_gradient(family: str, chunks: int, share: str) -> None:
    with streaming(share):
        resident.test_inductor_slices_equal_dense_gradient_at_other_cuts(family, chunks)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_frozen_parameters_are_left_out(frozen: str) -> None:
    with streaming("all"):
        resident.test_frozen_parameters_are_left_out(frozen)

"""Checks and other side effects of a forward happen once in each, in order, and their operators train exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import chunkft_fx
from tests.support.odd_blocks import WIDTH, assert_recomputes_exactly, assert_trains_exactly, blocks_of, compiled, rows

Step = Callable[[Any, Tensor], Tensor]


def _matrix(block: Any, h: Tensor) -> Tensor:
    a = block.a(h)
    return a.T @ a + 3 * torch.eye(WIDTH, dtype=h.dtype)


def inverse(block: Any, h: Tensor) -> Tensor:
    return block.b(h) @ torch.linalg.inv(_matrix(block, h))


def solution(block: Any, h: Tensor) -> Tensor:
    return torch.linalg.solve(_matrix(block, h), block.b(h).T).T.contiguous()


def factor(block: Any, h: Tensor) -> Tensor:
    return block.b(h) @ torch.linalg.cholesky(_matrix(block, h))


@pytest.mark.parametrize("step", [inverse, *(pytest.param(s, marks=pytest.mark.slow) for s in (solution, factor))])
def test_gradients_equal_the_plain_models(step: Step) -> None:
    assert_trains_exactly(blocks_of(step), rows())


@pytest.mark.parametrize("step", [inverse, *(pytest.param(s, marks=pytest.mark.slow) for s in (solution, factor))])
def test_gradients_are_exact_when_activations_are_computed_again(step: Step) -> None:
    assert_recomputes_exactly(blocks_of(step), rows(64))


def singular(block: Any, h: Tensor) -> Tensor:
    return block.b(h) @ torch.linalg.inv(_matrix(block, h) * 0)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_matrix_without_an_inverse_is_an_error_as_in_the_plain_model(backend: str) -> None:
    model = blocks_of(singular)
    module = chunkft_fx.compile(copy.deepcopy(model), "1GB", chunks=1, backend=backend)
    for call in (model, module):
        with pytest.raises(torch.linalg.LinAlgError, match="singular"):  # type: ignore[attr-defined]
            call(**rows())


def test_an_effect_happens_once_a_forward_also_where_activations_are_computed_again() -> None:
    seen: list[float] = []

    @torch.library.custom_op("chunkft_tests::note", mutates_args=())
    def note(x: Tensor) -> None:
        seen.append(float(x.sum()))

    @note.register_fake
    def _(x: Tensor) -> None:
        return None

    from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

    handle = _register_effectful_op("chunkft_tests::note", _EffectType.ORDERED)
    try:

        def noting(block: Any, h: Tensor) -> Tensor:
            g = block.a(h)
            note(g.detach())
            return block.b(g.sin())

        model = blocks_of(noting)
        module = compiled(model)
        model(**rows())
        want = seen.copy()
        seen.clear()
        module(**rows()).backward()
        assert len(want) == 2 and seen == pytest.approx(want, rel=1e-12)
    finally:
        handle.destroy()

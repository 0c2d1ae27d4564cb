"""The weight gradient's kernel in Triton's interpreter; `test_interpreted` runs this file in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from chunkft_fx.kernels import weight_gradient
from chunkft_fx.kernels.weight_gradient import Tiling, launch
from tests.kernels.operands import product_operands

SMALL = Tiling(rows=16, columns=32, depth=16, num_warps=4, num_stages=2, group=2)


@pytest.fixture(scope="module", autouse=True)
def _loops_of_run_time_length() -> Iterator[None]:
    """Triton 3.6's interpreter takes a loop's bounds by ``int(array)``, which numpy 2.4 refuses for one dimension."""
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", patched)
        yield


@settings(max_examples=20)
@given(
    tokens=st.integers(0, 70),
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    layout=st.sampled_from(["whole", "columns", "transposed"]),
    least=st.sampled_from([16, 512]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_strides(tokens: int, rows: int, columns: int, layout: str, least: int, seed: int) -> None:
    """``least`` small: the tokens of these problems are split. The interpreter multiplies bfloat16 as integers."""
    a, b = product_operands((tokens, rows), (tokens, columns), torch.float16, layout, "cpu", seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_gradient, "LEAST_TOKENS_A_SPLIT", least)
        found = launch(a, b, SMALL, described=False)
    _assert_product(found, a, b)


@pytest.mark.parametrize("least", [16, 512])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(64, 32, 64), (61, 40, 72), (5, 8, 8)])
def test_descriptors(tokens: int, rows: int, columns: int, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix within a wider one: what lies beside it must not be read as a part of it."""
    monkeypatch.setattr(weight_gradient, "LEAST_TOKENS_A_SPLIT", least)
    a, b = product_operands((tokens, rows), (tokens, columns), torch.float16, "columns", "cpu", 0)
    _assert_product(launch(a, b, SMALL, described=True), a, b)


def _assert_product(found: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Sums in float32 of products that float32 holds: within its rounding of the sum of their sizes."""
    exact = a.double().t() @ b.double()
    bound = a.double().abs().t() @ b.double().abs() * torch.finfo(torch.float32).eps * max(a.shape[0], 1)
    assert found.dtype == torch.float32 and found.shape == exact.shape
    assert bool(((found.double() - exact).abs() <= bound).all())

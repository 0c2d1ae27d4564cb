"""The weight gradient's kernel on CUDA: against float64, in a step, and its measurement."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import chunkft_fx
from chunkft_fx.kernels import weight_gradient as kernel
from chunkft_fx.kernels.weight_gradient import LIBRARY, TILINGS, Problem, weight_gradient
from chunkft_fx.machine import kernel_choice
from chunkft_fx.tools.zoo import tiny
from tests.kernels.operands import product_operands
from tests.machine.test_kernel_choice import choose_everywhere
from tests.support.equivalence import chunk_gradients

pytestmark = pytest.mark.gpu

SIZES = [(1, 1, 1), (17, 33, 65), (300, 129, 257), (1024, 256, 512), (2500, 200, 136), (4096, 96, 1000)]


def assert_product(found: Tensor, a: Tensor, b: Tensor) -> None:
    """Sums in float32 of products that float32 holds: within its rounding of the sum of their sizes."""
    exact = a.double().t() @ b.double()
    bound = a.double().abs().t() @ b.double().abs() * torch.finfo(torch.float32).eps * max(a.shape[0], 4)
    assert found.dtype == torch.float32 and found.shape == exact.shape
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["whole", "columns", "transposed"])
@pytest.mark.parametrize("by", TILINGS)
def test_kernel_equals_float64(by: str, layout: str, dtype: torch.dtype) -> None:
    for tokens, rows, columns in SIZES:
        a, b = product_operands((tokens, rows), (tokens, columns), dtype, layout, "cuda", tokens)
        assert_product(kernel.launch(a, b, TILINGS[by]), a, b)
        assert_product(kernel.launch(a, b, TILINGS[by], described=False), a, b)


@pytest.mark.parametrize("by", [LIBRARY, *TILINGS])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("start", [0, 3, 64])
def test_the_operator_reads_the_slice_in_place(start: int, dim: int, by: str) -> None:
    """Also from a start that is no multiple of 16 bytes, where tensor descriptors cannot be used."""
    dy, x = product_operands((700, 200), (700, 328), torch.bfloat16, "whole", "cuda", 0)
    found = weight_gradient(dy, x, torch.tensor(start), dim, 130, by)
    a, b = (dy[:, start : start + 130], x) if dim == 0 else (dy, x[:, start : start + 130])
    assert_product(found, a, b)
    assert torch.equal(found, weight_gradient(dy, x, torch.tensor(start), dim, 130, by))


def test_nothing_to_sum_is_zero() -> None:
    a, b = torch.zeros(0, 8, device="cuda").bfloat16(), torch.zeros(0, 16, device="cuda").bfloat16()
    assert kernel.launch(a, b, TILINGS["128x256"]).tolist() == [[0.0] * 16] * 8


@pytest.mark.parametrize("by", [LIBRARY, "128x128"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_step_gives_the_librarys_gradients(backend: Any, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny("llama", dtype=torch.bfloat16)
    model.cuda()
    values = {name: value.cuda() for name, value in batch(2, 12, 0).items()}
    monkeypatch.setattr("chunkft_fx.module.sessions.chooser", lambda device: lambda problem: None)
    usual = chunk_gradients(
        chunkft_fx.compile(copy.deepcopy(model), "8GB", chunks=5, interval=1, backend=backend), values
    )
    asked = choose_everywhere(monkeypatch, by)
    lowered = chunkft_fx.compile(copy.deepcopy(model), "8GB", chunks=5, interval=1, backend=backend)
    found = chunk_gradients(lowered, values)
    assert asked
    assert sum(v.counts["lower_triton"] for v in lowered.variants if v.backward is not None) > 0
    for name, expected in usual[1].items():
        # once rounded to bfloat16 at most, on one of the two sides
        atol = 2.0**-8 * float(expected.abs().max())
        torch.testing.assert_close(found[1][name], expected, rtol=torch.finfo(torch.bfloat16).eps, atol=atol)


def test_a_problem_is_measured_and_leaves_no_memory_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CHUNKFT_CACHE", str(tmp_path))
    monkeypatch.setattr(kernel_choice, "_known", {})
    device = torch.device("cuda", torch.cuda.current_device())
    problem = Problem(1024, 256, 1024, 0, torch.bfloat16)
    kernel_choice.measure(problem, device)  # the library takes its workspace
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    times = kernel_choice.measure(problem, device)
    assert times.keys() == {None, LIBRARY, *TILINGS}
    assert all(us > 0 for us in times.values())
    assert torch.cuda.max_memory_allocated(device) - before <= kernel_choice.operand_nbytes(problem)
    assert kernel_choice.choice(device, problem) in {None, LIBRARY, *TILINGS}
    assert torch.cuda.memory_allocated(device) == before
    assert (tmp_path / "kernels.json").exists()

"""Steps on CUDA: the same gradients as the plain model's, and the same training run as on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import chunkft_fx
from chunkft_fx.tools.zoo import tiny
from tests.support.equivalence import assert_same_gradients, loss_of

pytestmark = pytest.mark.gpu


def on_cuda(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cuda() for name, value in batch.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "cnn", "mlp"])
def test_eager_slices_equal_dense_gradient_on_cuda(family: str) -> None:
    model, batch = tiny(family, dtype=torch.float64)
    model.cuda()
    compiled = chunkft_fx.compile(copy.deepcopy(model), "8GB", chunks=3, interval=1, backend="eager")
    assert_same_gradients(compiled, model, on_cuda(batch(2, 12, 0)), 1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "cnn"])
def test_inductor_slices_equal_dense_gradient_on_cuda(family: str) -> None:
    model, batch = tiny(family)
    model.cuda()
    compiled = chunkft_fx.compile(copy.deepcopy(model), "8GB", chunks=3, interval=1)
    assert_same_gradients(compiled, model, on_cuda(batch(2, 12, 0)), 1e-4)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_dropout_agrees_under_a_fixed_seed_on_cuda(backend: Any) -> None:
    """With attention written out: traced and plain code may choose different fused kernels, which draw differently."""
    model, batch = tiny("bert", dropout=0.2)
    model.cuda()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    compiled = chunkft_fx.compile(copy.deepcopy(model), "8GB", chunks=3, interval=1, backend=backend)
    assert_same_gradients(compiled, model, on_cuda(batch(2, 12, 0)), 1e-4)


def test_training_on_cuda_equals_training_on_the_cpu() -> None:
    """Three sweeps in float64: fetching, updating and writing back states on the GPU changes nothing."""
    runs = []
    for device in ("cpu", "cuda"):
        model, batch = tiny("bert", dtype=torch.float64)
        compiled = chunkft_fx.compile(model.to(device), "8GB", chunks=5, interval=1, backend="eager")
        optimizer = chunkft_fx.AdamW(compiled, lr=1e-3, max_grad_norm=1.0)
        for step in range(15):
            loss_of(compiled(**{n: v.to(device) for n, v in batch(2, 12, step).items()})).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append([p.detach().cpu() for p in compiled.parameters()])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_memory_returns_to_what_is_resident_after_a_step() -> None:
    model, batch = tiny("llama", dtype=torch.bfloat16)
    model.cuda()
    compiled = chunkft_fx.compile(model, "8GB", chunks=3, interval=1)
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-3)
    used = []
    for step in range(9):
        loss_of(compiled(**on_cuda(batch(2, 12, step)))).backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[8] == used[5]


def test_segments_grow_in_place_under_a_budget() -> None:
    """Memory taken once a batch is planned for lies in expandable segments."""
    model, batch = tiny("llama", dtype=torch.bfloat16)
    compiled = chunkft_fx.compile(model, "8GB", chunks=3, interval=1, device="cuda")
    loss_of(compiled(**on_cuda(batch(2, 12, 0)))).backward()
    large = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    segments = torch.cuda.memory_snapshot()
    (found,) = [s for s in segments if s["address"] <= large.data_ptr() < s["address"] + s["total_size"]]
    assert found["is_expandable"]

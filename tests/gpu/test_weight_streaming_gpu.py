"""Streamed weights on CUDA: copies on their own stream change neither gradients nor training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import chunkft_fx
from chunkft_fx.errors import BudgetInfeasible
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.tools.zoo import tiny
from tests.gpu.test_step_gpu import on_cuda
from tests.support.equivalence import assert_same_gradients, loss_of
from tests.support.forced_splits import unsplit

pytestmark = pytest.mark.gpu


def tight(model: nn.Module, batch: dict[str, Any], backend: str) -> CompiledModule:
    """A copy of a model in host memory, compiled for CUDA under the smallest feasible budget."""

    def compiled(budget: int) -> CompiledModule:
        made = chunkft_fx.compile(copy.deepcopy(model), budget, chunks=3, interval=1, backend=backend, device="cuda")
        made(**batch)
        return made

    with unsplit(), pytest.raises(BudgetInfeasible) as caught:
        compiled(1)
    return compiled(caught.value.smallest_budget_bytes)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_of_streamed_weights_on_cuda(family: str) -> None:
    model, batch = tiny(family, dtype=torch.float64)
    model.train()
    compiled = tight(model, on_cuda(batch(2, 12, 0)), "eager")
    assert compiled.plan.streamed
    assert all(dict(compiled.named_parameters())[n].device.type == "cpu" for n in compiled.plan.streamed)
    compiled_model = copy.deepcopy(model).cuda()
    _losses_and_gradients_equal(compiled, compiled_model, on_cuda(batch(2, 12, 0)))


def _losses_and_gradients_equal(compiled: CompiledModule, plain: nn.Module, batch: dict[str, Any]) -> None:
    dense = chunkft_fx.compile(copy.deepcopy(plain), "8GB", chunks=3, interval=1, backend="eager")
    assert_same_gradients(dense, plain, batch, 1e-9)
    for k in range(3):
        for module in (dense, compiled):
            module.activate(k)
            loss_of(module(**batch)).backward()
        for a, b in zip(dense.active_slices(), compiled.active_slices(), strict=True):
            assert a.slice == b.slice
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None and b.grad is not None:
                torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_with_streamed_weights_on_cuda(dtype: torch.dtype) -> None:
    model, batch = tiny("llama", dtype=dtype)
    resident = chunkft_fx.compile(copy.deepcopy(model).cuda(), "8GB", chunks=3, interval=1, backend="eager")
    streamed = tight(model, on_cuda(batch(2, 12, 0)), "eager")
    for compiled in (resident, streamed):
        optimizer = chunkft_fx.AdamW(compiled, lr=1e-2)
        for step in range(6):
            loss_of(compiled(**on_cuda(batch(2, 12, step)))).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(resident.state_dict().items(), streamed.state_dict().values(), strict=True):
        torch.testing.assert_close(b.cpu(), a.cpu(), rtol=1e-4, atol=1e-5, msg=name)


def test_streamed_weights_compile_with_inductor_on_cuda() -> None:
    model, batch = tiny("llama")
    compiled = tight(model, on_cuda(batch(2, 12, 0)), "inductor")
    first = float(loss_of(compiled(**on_cuda(batch(2, 12, 0)))).detach())
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2)
    for _ in range(6):
        loss = loss_of(compiled(**on_cuda(batch(2, 12, 0))))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < first

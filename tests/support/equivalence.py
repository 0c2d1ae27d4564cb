"""Shared by tests: the dense gradients of a model, and the comparison of chunk slices with them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.module.module import CompiledModule
from tests.support.forced_splits import unsplit


def loss_of(result: Any) -> Tensor:
    """The loss in whatever a model returns: the result itself, its ``loss``, or its first item."""
    if isinstance(result, Tensor):
        return result
    loss = getattr(result, "loss", None)
    return loss if isinstance(loss, Tensor) else result[0]


def dense_gradients(model: nn.Module, batch: dict[str, Any], seed: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a copy of the plain model, under a fixed seed; absent gradients count as zero."""
    plain = copy.deepcopy(model)
    torch.manual_seed(seed)
    loss = loss_of(plain(**batch))
    loss.backward()
    gradients = {
        n: torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
        for n, p in plain.named_parameters()
        if p.requires_grad
    }
    return loss.detach(), gradients


def chunk_gradients(
    compiled: CompiledModule, batch: dict[str, Any], seed: int = 5
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses per chunk, and the gradients of all chunks taken at the same weights, put together.

    Fails if the chunks' slices do not cover every element exactly once.
    """
    parameters = {n: p for n, p in compiled.named_parameters() if p.requires_grad}
    wide = {n: torch.promote_types(p.dtype, torch.float32) for n, p in parameters.items()}
    whole = {n: torch.zeros(p.shape, dtype=wide[n], device=p.device) for n, p in parameters.items()}
    visits = {n: torch.zeros(p.shape, dtype=torch.int64) for n, p in parameters.items()}
    losses = []
    for k in range(len(compiled.plan.chunks)):
        compiled.activate(k)
        torch.manual_seed(seed)
        loss = loss_of(compiled(**batch))
        loss.backward()
        losses.append(loss.detach())
        for s in compiled.active_slices():
            place = whole[s.name] if s.slice.is_whole else whole[s.name].narrow(s.dim, s.start, s.length)
            seen = visits[s.name] if s.slice.is_whole else visits[s.name].narrow(s.dim, s.start, s.length)
            seen += 1
            if s.grad is not None:
                assert s.grad.shape == place.shape
                place.copy_(s.grad)
    assert all(bool((v == 1).all()) for v in visits.values()), "the slices are not a partition of the parameters"
    return losses, whole


def relative_error(value: Tensor, reference: Tensor, scale: float) -> float:
    """||value - reference|| / ||reference||; a gradient that is zero up to rounding is measured against ``scale``."""
    norm = max(float(reference.norm()), scale)
    return float((value.to(reference.dtype) - reference).norm()) / norm


def assert_same_gradients(compiled: CompiledModule, model: nn.Module, batch: dict[str, Any], tolerance: float) -> None:
    """Every slice's gradient equals the dense one to ``tolerance``, relative to the slice's own norm.

    Slices whose true gradient is zero (a bias before a normalisation) hold only rounding noise; their
    error is measured against 1e-4 of the largest gradient.
    """
    loss, dense = dense_gradients(model, batch)
    losses, sliced = chunk_gradients(compiled, batch)
    for value in losses:
        torch.testing.assert_close(value, loss, rtol=max(tolerance, 1e-9), atol=0)
    scale = 1e-4 * max(float(g.norm()) for g in dense.values())
    for chunk in compiled.plan.chunks:
        for part in chunk.slices:
            a, b = sliced[part.name], dense[part.name]
            if not part.is_whole:
                a, b = a.narrow(part.dim, part.start, part.length), b.narrow(part.dim, part.start, part.length)
            error = relative_error(a, b, scale)
            assert error <= tolerance, f"{part}: relative error {error:.2e}"


def smallest_budget(model: nn.Module, batch: dict[str, Any], chunks: int | str = "auto") -> int:
    """The bytes that the error for a hopeless budget names as enough for a step on this batch, if it is not split."""
    hopeless = chunkft_fx.compile(copy.deepcopy(model), 1, chunks=chunks, interval=1, backend="eager")
    with unsplit(), pytest.raises(chunkft_fx.errors.BudgetInfeasible) as caught:
        hopeless(**batch)
    return caught.value.smallest_budget_bytes

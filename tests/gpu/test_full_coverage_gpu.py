"""Steps that cover all parameters on CUDA: states through the ring, weights on the device or streamed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.copies.states.ring import CopyingRing
from chunkft_fx.plan import pieces
from tests.runtime.test_full_coverage import Tied, batch
from tests.support.forced_streaming import resident_or_streamed

__all__ = ["resident_or_streamed"]

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LARGEST_NBYTES", 2000)


def trained(model: nn.Module, device: str, update: str, master: str = "float32") -> tuple[nn.Module, chunkft_fx.AdamW]:
    compiled = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager", device=device)
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2, update=update, master=master)
    for step in range(6):
        compiled(batch(step).to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return compiled, optimizer


@pytest.mark.usefixtures("resident_or_streamed")
@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_steps_equal_those_of_the_cpu(dtype: torch.dtype, update: str) -> None:
    torch.manual_seed(0)
    model = Tied(dtype)
    other = copy.deepcopy(model)
    ours, optimizer = trained(model, "cuda", update)
    assert optimizer.updates is not None
    assert isinstance(optimizer.updates._ring, CopyingRing)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-2)
    for step in range(6):
        other(batch(step)).backward()
        theirs.step()
        theirs.zero_grad()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for p, q in zip(ours.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=tolerance, atol=tolerance)
    states = optimizer.state_dict()["state"]
    for i, q in enumerate(other.parameters()):
        kept: Tensor = states[i]["exp_avg"]
        torch.testing.assert_close(kept.cpu(), theirs.state[q]["exp_avg"], rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("resident_or_streamed")
def test_masters_of_both_formats_give_the_same_steps_whenever_they_happen() -> None:
    found = []
    for update, master in (("step", "float32"), ("backward", "float32"), ("backward", "remainder")):
        torch.manual_seed(0)
        _, optimizer = trained(Tied(torch.bfloat16), "cuda", update, master)
        states = optimizer.state_dict()["state"]
        found.append([states[i]["master"].cpu() for i in sorted(states)])
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("resident_or_streamed")
@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_micro_batches_equal_those_of_the_cpu_in_turn(dtype: torch.dtype, update: str) -> None:
    torch.manual_seed(0)
    model = Tied(dtype)
    other = copy.deepcopy(model)
    compiled = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager", device="cuda")
    ours, theirs = chunkft_fx.AdamW(compiled, lr=1e-2, update=update), torch.optim.AdamW(other.parameters(), lr=1e-2)
    for step in range(6):
        batches = [batch(10 * step + i) for i in range(3)]
        torch.stack(compiled.accumulate([ids.to("cuda") for ids in batches])).sum().backward()
        for ids in batches:
            other(ids).backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for p, q in zip(compiled.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("resident_or_streamed")
@pytest.mark.parametrize("update", ["backward", "step"])
@pytest.mark.parametrize("buffers", [3, 16])
def test_pieces_are_updated_between_the_calls_of_micro_batches(
    update: Any, buffers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer buffers than a region has pieces, over the link that brings weights, values and states in turn."""
    monkeypatch.setattr(pieces, "LARGEST_NBYTES", 300)
    monkeypatch.setattr(pieces, "MOST_BUFFERS", buffers)
    plain = Tied()
    ours: Any = chunkft_fx.compile(copy.deepcopy(plain), "1GB", coverage="all", backend="eager", device="cuda")
    optimizers = [chunkft_fx.AdamW(ours, lr=1e-2, update=update), torch.optim.AdamW(plain.parameters(), lr=1e-2)]
    for step in range(6):
        given = [batch(10 * step + i) for i in range(4)]
        torch.stack(ours.accumulate([(b.cuda(),) for b in given])).sum().backward()
        torch.stack([plain(b) for b in given]).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-9, atol=1e-9, msg=name)

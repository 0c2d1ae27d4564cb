"""Steps that cover all parameters on CUDA: states through the ring, weights on the device or streamed."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.copies.states.ring import CopyingRing
from chunkft_fx.plan import pieces
from tests.runtime.test_full_coverage import Tied, batch
from tests.support.forced_streaming import streaming

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LARGEST_NBYTES", 2000)


@pytest.fixture(params=["resident", "streamed"])
def _where(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "resident":
        yield
        return
    with streaming("all"):
        yield


def trained(model: nn.Module, device: str, update: str, master: str = "float32") -> tuple[nn.Module, chunkft_fx.AdamW]:
    compiled = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager", device=device)
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2, update=update, master=master)
    for step in range(6):
        compiled(batch(step).to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return compiled, optimizer


@pytest.mark.usefixtures("_where")
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


@pytest.mark.usefixtures("_where")
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


@pytest.mark.usefixtures("_where")
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

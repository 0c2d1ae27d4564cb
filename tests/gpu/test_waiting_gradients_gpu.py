"""Gradients in host memory on CUDA: the numbers of the device and of torch, whenever copies happen."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import chunkft_fx
from chunkft_fx.copies.states.ring import CopyingRing
from chunkft_fx.errors import BudgetInfeasible, UsedGradientError, WaitingGradientError
from chunkft_fx.gradients.waiting import WaitingGradient
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.plan import pieces
from tests.runtime.test_full_coverage import Tied, batch
from tests.support.forced_splits import unsplit
from tests.support.forced_streaming import resident_or_streamed
from tests.support.waiting import waiting_in_host

__all__ = ["resident_or_streamed"]

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LARGEST_NBYTES", 2000)


def compiled(model: nn.Module) -> CompiledModule:
    made = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager", device="cuda")
    assert isinstance(made, CompiledModule)
    return made


@pytest.mark.usefixtures("resident_or_streamed")
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_steps_equal_those_of_torch(dtype: torch.dtype, clip: float | None) -> None:
    torch.manual_seed(0)
    model = Tied(dtype)
    other = copy.deepcopy(model)
    with waiting_in_host():
        ours = compiled(model)
        optimizer = chunkft_fx.AdamW(ours, lr=1e-2, max_grad_norm=clip)
        theirs = torch.optim.AdamW(other.parameters(), lr=1e-2)
        tolerance = 1e-9 if dtype == torch.float64 else 1e-4
        for step in range(6):
            for i in range(1 + step % 3):
                ours(batch(10 * step + i).cuda()).backward()
                other(batch(10 * step + i)).backward()
            for p, q in zip(ours.parameters(), other.parameters(), strict=True):
                assert isinstance(p.grad, WaitingGradient)
                assert q.grad is not None
                torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=tolerance, atol=tolerance)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(other.parameters(), clip)
            for o in (optimizer, theirs):
                o.step()
                o.zero_grad()
        waiting = ours._training.waiting
        assert waiting is not None
        assert isinstance(waiting._ring, CopyingRing)
        for p, q in zip(ours.state_dict().values(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(p.cpu(), q, rtol=tolerance, atol=tolerance)


class Deep(nn.Module):
    """Wide layers, so that copies take long beside what makes the gradients."""

    def __init__(self, dtype: torch.dtype, width: int = 1024) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, dtype=dtype) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x.float().square().mean()


@pytest.mark.usefixtures("resident_or_streamed")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_passes_that_only_accumulate_wait_for_the_backward_that_updates(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Tied(dtype)
    other = copy.deepcopy(model)
    ours = compiled(model)
    optimizer = chunkft_fx.AdamW(ours, lr=1e-2, update="backward")
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-2)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for step in range(6):
        for i in range(step % 3):
            with ours.no_sync():
                ours(batch(10 * step + i).cuda()).backward()
            other(batch(10 * step + i)).backward()
            assert all(isinstance(p.grad, WaitingGradient) for p in ours.parameters())
        ours(batch(10 * step + 9).cuda()).backward()
        other(batch(10 * step + 9)).backward()
        for o in (optimizer, theirs):
            o.step()
            o.zero_grad()
    for p, q in zip(ours.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=tolerance, atol=tolerance)


def in_both_places(train: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """What training gives with gradients in host memory, and on the device."""
    with waiting_in_host():
        in_host = train()
    return [in_host, train()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_equal_those_on_the_device_to_the_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing between backward, changes by the user, and step waits for the device."""
    monkeypatch.setattr(pieces, "LARGEST_NBYTES", 2**20)
    places = []

    def train() -> list[Tensor]:
        torch.manual_seed(0)
        ours = compiled(Deep(dtype))
        optimizer = chunkft_fx.AdamW(ours, lr=1e-3)
        seen = []
        for step in range(4):
            for i in range(1 + step % 3):
                x = torch.full((64, 1024), 0.01 * (step + i + 1), dtype=dtype, device="cuda")
                ours(x).backward()
                if i == 1:
                    for p in ours.parameters():
                        assert p.grad is not None
                        p.grad.mul_(0.5)
                        p.grad.add_(torch.ones_like(p.grad))
            seen += [p.grad.clone() for p in ours.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
        places.append(ours.plan.policy.host_gradients)
        return [*seen, *(p.detach().clone() for p in ours.parameters())]

    for a, b in zip(*in_both_places(train), strict=True):
        assert torch.equal(a, b)
    assert places == [True, False]


def test_a_scaler_with_float16_weights_skips_what_overflows() -> None:
    def train() -> list[Tensor]:
        torch.manual_seed(0)
        ours = compiled(Deep(torch.float16, 256))
        optimizer, scaler = chunkft_fx.AdamW(ours, lr=1e-3), torch.amp.GradScaler("cuda", init_scale=2.0**30)
        for step in range(12):
            x = torch.full((8, 256), 0.1 * (step + 1), dtype=torch.float16, device="cuda")
            scaler.scale(ours(x)).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(ours.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return [torch.tensor(scaler.get_scale()), *(p.detach().float().cpu() for p in ours.parameters())]

    found = in_both_places(train)
    assert found[0][0] < 2.0**30
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_a_gradient_that_is_gone_says_so() -> None:
    with waiting_in_host():
        ours = compiled(Tied(torch.float32))
        ours(batch(0).cuda()).backward()
        old = ours.get_parameter("layers.0.weight").grad
        assert old is not None
        ours.zero_grad()
        ours(batch(1).cuda()).backward()
        with pytest.raises(WaitingGradientError):
            old.norm()
    updated = compiled(Tied(torch.float32))
    optimizer = chunkft_fx.AdamW(updated, update="backward")
    updated(batch(0).cuda()).backward()
    with pytest.raises(UsedGradientError):
        torch.nn.utils.clip_grad_norm_(updated.parameters(), 1.0)
    optimizer.step()


def _train() -> tuple[int, int, int, bool]:
    """Budget, predicted and reserved bytes of steps whose gradients wait in host memory, in a process of their own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=8, vocab_size=32000,
        use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().train()
    ids = torch.randint(0, 32000, (2, 512), device="cuda")
    with unsplit(), pytest.raises(BudgetInfeasible) as caught:
        chunkft_fx.compile(model, 1, coverage="all", device="cuda")(input_ids=ids, labels=ids)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # what a calibration took
    ours = chunkft_fx.compile(model, int(1.2 * caught.value.smallest_budget_bytes), coverage="all", device="cuda")
    assert isinstance(ours, CompiledModule)
    optimizer = chunkft_fx.AdamW(ours, lr=1e-4, max_grad_norm=1.0)
    for count in (1, 2, 1, 2):
        for _ in range(count):
            ours(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    plan = ours.plan
    assert plan.predicted_peak_bytes is not None
    return plan.budget_bytes, plan.predicted_peak_bytes, torch.cuda.max_memory_reserved(), plan.policy.host_gradients


def test_steps_stay_within_a_budget_without_room_for_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # kernels are timed, which takes memory as well
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        budget, predicted, reserved, is_in_host = pool.submit(_train).result()
    assert is_in_host
    assert predicted <= budget
    assert reserved <= budget

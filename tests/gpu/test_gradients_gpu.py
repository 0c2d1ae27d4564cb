"""Slice gradients on CUDA, also of weights in host memory: torch's tools, outside uses, moves, threads, failures."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx import errors
from chunkft_fx.copies.link import open_link
from chunkft_fx.copies.tier import HostTier
from chunkft_fx.copies.weight_ring import Ring
from chunkft_fx.machine.calibrate import calibrate
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.runtime.step import Machine
from chunkft_fx.tools.zoo import tiny
from tests.gpu.test_step_gpu import on_cuda
from tests.gpu.test_weight_streaming_gpu import tight
from tests.support.equivalence import dense_gradients, loss_of, relative_error
from tests.support.forced_streaming import streaming

pytestmark = pytest.mark.gpu


def placed(kind: str, dtype: torch.dtype) -> tuple[nn.Module, CompiledModule, dict[str, Any]]:
    """A model on CUDA, the same compiled with its weights on the device or in host memory, and a batch."""
    model, batch = tiny("llama", dtype=dtype)
    model.train()
    given = on_cuda(batch(2, 12, 0))
    if kind == "streamed":
        compiled = tight(model, given, "eager")
        assert compiled.plan.streamed
    else:
        compiled = chunkft_fx.compile(copy.deepcopy(model).cuda(), "8GB", chunks=3, interval=1, backend="eager")
        compiled(**given)
    return model.cuda(), compiled, given


def dense_parts(model: nn.Module, compiled: CompiledModule, batch: dict[str, Any]) -> dict[str, Tensor]:
    _, dense = dense_gradients(model, batch)
    return {
        s.name: dense[s.name] if s.slice.is_whole else dense[s.name].narrow(s.dim, s.start, s.length)
        for s in compiled.active_slices()
    }


@pytest.mark.parametrize("kind", ["resident", "streamed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_clips_accumulates_and_drops_on_cuda(kind: str, dtype: torch.dtype) -> None:
    model, compiled, batch = placed(kind, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for chunk in range(3):
        compiled.activate(chunk)
        parts = dense_parts(model, compiled, batch)
        for times in (1, 2):
            loss_of(compiled(**batch)).backward()
            for s in compiled.active_slices():
                assert s.grad is not None
                assert s.grad.device.type == "cuda"
                assert s.grad.dtype == torch.float32
                assert s.parameter.grad is not None
                assert s.parameter.grad.shape == s.parameter.shape
                assert relative_error(s.grad, times * parts[s.name].float(), 1e-4) < tolerance
        own = torch.stack([s.grad.norm() for s in compiled.active_slices() if s.grad is not None]).norm()
        found = torch.nn.utils.clip_grad_norm_(compiled.parameters(), 0.1)
        assert float(found) == pytest.approx(float(own), rel=1e-5)
        clipped = torch.stack([s.grad.norm() for s in compiled.active_slices() if s.grad is not None]).norm()
        assert float(clipped) == pytest.approx(0.1, rel=1e-3)
        compiled.zero_grad()
        assert all(p.grad is None for p in compiled.parameters())


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_a_scaler_skips_an_overflow_and_keeps_the_chunk_on_cuda(kind: str) -> None:
    _, compiled, batch = placed(kind, torch.float16)
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-3)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    before = {n: p.detach().clone() for n, p in compiled.named_parameters()}
    chunk = compiled.chunk
    scaler.scale(loss_of(compiled(**batch)) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert (compiled.chunk, scaler.get_scale()) == (chunk, 2.0**7)
    assert all(torch.equal(p, before[n]) for n, p in compiled.named_parameters())
    scaler.scale(loss_of(compiled(**batch))).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.cuda.synchronize()
    assert compiled.chunk == (chunk + 1) % 3
    assert any(not torch.equal(p, before[n]) for n, p in compiled.named_parameters())


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_a_penalty_outside_of_the_call_is_added_on_cuda(kind: str) -> None:
    model, compiled, batch = placed(kind, torch.float32)
    resident = [n for n, p in compiled.named_parameters() if p.is_cuda]

    def penalised(module: nn.Module) -> Tensor:
        return loss_of(module(**batch)) + sum(module.get_parameter(n).square().sum() for n in resident)

    plain = copy.deepcopy(model)
    penalised(plain).backward()
    compiled.activate(2)
    penalised(compiled).backward()
    for s in compiled.active_slices():
        want = plain.get_parameter(s.name).grad
        assert want is not None and s.grad is not None
        part = want if s.slice.is_whole else want.narrow(s.dim, s.start, s.length)
        assert relative_error(s.grad, part, 1e-4) < 1e-5
    active = {s.name for s in compiled.active_slices()}
    assert all(p.grad is None for n, p in compiled.named_parameters() if n not in active)


def test_a_model_compiled_in_host_memory_moves_before_the_first_step() -> None:
    model, batch = tiny("llama", dtype=torch.float32)
    compiled = chunkft_fx.compile(copy.deepcopy(model), "8GB", chunks=2, interval=1, backend="eager").cuda()
    assert compiled._training.compute_device.type == "cuda"
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-3)
    loss = loss_of(compiled(**on_cuda(batch(2, 12, 0))))
    assert loss.is_cuda
    loss.backward()
    optimizer.step()
    streamed = tight(model, on_cuda(batch(2, 12, 0)), "eager")
    assert streamed.to("cuda") is streamed
    assert all(not streamed.get_parameter(n).is_cuda for n in streamed.plan.streamed)
    with pytest.raises(errors.ModelChanged, match="dtype"):
        compiled.half()


def test_evaluation_with_streamed_weights_from_two_threads_on_cuda() -> None:
    model, batch = tiny("llama", dtype=torch.float32)
    batches = [on_cuda(batch(2, 12, seed)) for seed in (1, 2)]
    plain = copy.deepcopy(model).cuda().eval()
    with torch.no_grad():
        wanted = [float(loss_of(plain(**b))) for b in batches]
    wrong: list[float] = []
    with streaming("all"):
        compiled = chunkft_fx.compile(model.train(), "8GB", chunks=3, interval=1, backend="eager", device="cuda")
        compiled(**batches[0])
        compiled.eval()

        def evaluate(k: int) -> None:
            with torch.no_grad():
                for _ in range(60):
                    found = float(loss_of(compiled(**batches[k])))
                    if found != pytest.approx(wanted[k], rel=1e-4):
                        wrong.append(found)

        threads = [threading.Thread(target=evaluate, args=(k,)) for k in (0, 1)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not wrong


def test_an_abandoned_step_ends_the_fetches_of_the_ring() -> None:
    """Its buffers are freed when a larger ring is made: a copy under way would write into whoever gets the memory."""
    device = torch.device("cuda", torch.cuda.current_device())
    ring = Ring(open_link(device), HostTier(device), 2, 2**28)
    host = [torch.ones(2**26, pin_memory=True)]
    ring.fetch(host, 0)  # 256 MiB take 5 ms
    Machine("eager", None, ring).abandon()
    pointer = ring._buffers[0].data_ptr()
    ring._buffers.clear()
    taken = [torch.zeros(2**26, device="cuda") for _ in range(2)]
    torch.cuda.synchronize()
    assert pointer in [t.data_ptr() for t in taken], "the allocator gave other memory: the test shows nothing"
    assert not any(t.any() for t in taken), "a copy of the abandoned step wrote into memory that another tensor has"


def test_rates_are_measured_on_a_nearly_full_card() -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(free - 400 * 2**20, dtype=torch.uint8, device="cuda")
    try:
        measured = calibrate("cuda")
    finally:
        del held
        torch.cuda.empty_cache()
    assert measured.memory_nbytes_per_s > 1e11

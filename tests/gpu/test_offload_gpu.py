"""Offloaded saved values on CUDA: copies on their own stream change neither gradients nor training, and free memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.copies.link import open_link
from chunkft_fx.copies.saved_values import SavedValues
from chunkft_fx.copies.tier import HostTier
from chunkft_fx.graph import ops
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.passes.program import offload_saved
from chunkft_fx.predict.step_memory import step_timeline
from chunkft_fx.tools.zoo import tiny
from tests.gpu.test_step_gpu import on_cuda
from tests.program.test_structure import deep_llama
from tests.support.equivalence import assert_same_gradients, loss_of
from tests.support.forced_policy import force

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def small_values_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload_saved, "SMALLEST_NBYTES", 1)


def compiled_on_cuda(
    model: nn.Module, batch: dict[str, Tensor], is_offloading: bool, chunks: int = 3, backend: str = "eager"
) -> CompiledModule:
    """A copy of a model that recomputes everything, and offloads all that may go, or nothing."""
    compiled = chunkft_fx.compile(copy.deepcopy(model).cuda(), "8GB", chunks=chunks, interval=1, backend=backend)
    compiled(**on_cuda(batch))
    session = compiled._training.sessions[-1]
    regions = len(session.programs.outline.regions)
    force(compiled, save_from=regions)
    force(compiled, offload_below=regions if is_offloading else 0)
    return compiled


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "cnn"])
def test_gradients_with_offloaded_values_on_cuda(family: str) -> None:
    model, batch = tiny(family, dtype=torch.float64)
    compiled = compiled_on_cuda(model, batch(2, 12, 0), is_offloading=True)
    assert_same_gradients(compiled, copy.deepcopy(model).cuda(), on_cuda(batch(2, 12, 0)), 1e-9)
    compiled.activate(0)
    compiled(**on_cuda(batch(2, 12, 0)))
    assert any(n.target is ops.offload for n in compiled.program.graph.nodes)
    assert compiled._training.engines.saved.pool.take(1).memory.is_pinned()


def wide_batch(seed: int) -> dict[str, Tensor]:
    """Enough tokens that copies take longer than launches: a copy that is not waited for would be noticed."""
    ids = torch.randint(0, 256, (64, 256), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_training_with_offloaded_values_is_the_same_on_cuda(backend: str) -> None:
    model = deep_llama(8)
    runs = []
    for is_offloading in (False, True):
        compiled = compiled_on_cuda(model, wide_batch(0), is_offloading, backend=backend)
        optimizer = chunkft_fx.AdamW(compiled, lr=1e-3)
        losses = []
        for step in range(9):
            # accumulation over two forwards before their backwards: both own host copies at the same time
            pending = [loss_of(compiled(**on_cuda(wide_batch(2 * step + i)))) for i in (0, 1)]
            for loss in pending:
                loss.backward()
            losses.append(float(pending[0].detach()))
            optimizer.step()
            optimizer.zero_grad()
        runs.append(losses)
    torch.testing.assert_close(torch.tensor(runs[1]), torch.tensor(runs[0]), rtol=1e-5, atol=0)


def test_device_memory_falls_by_what_the_memory_model_says() -> None:
    measured, predicted = [], []
    for is_offloading in (False, True):
        compiled = compiled_on_cuda(deep_llama(24), wide_batch(0), is_offloading, chunks=8)
        loss_of(compiled(**on_cuda(wide_batch(0)))).backward()
        for s in compiled.active_slices():
            s.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss_of(compiled(**on_cuda(wide_batch(1)))).backward()
        torch.cuda.synchronize()
        measured.append(torch.cuda.max_memory_allocated() - before)
        executable = compiled._training.sessions[-1].programs.last
        assert executable is not None
        predicted.append(max(m.nbytes for m in step_timeline(executable, "eager", is_first=True)))
        del compiled, executable
        torch._dynamo.reset()
    saved = 64 * 256 * 64 * 4  # one block's input: f32[64, 256, 64]
    assert measured[0] - measured[1] >= 16 * saved
    assert predicted[0] - predicted[1] == pytest.approx(measured[0] - measured[1], rel=0.05)


def test_a_failed_step_leaves_no_copy_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compiled_on_cuda(deep_llama(8), wide_batch(0), is_offloading=True)
    batch = on_cuda(wide_batch(1))

    def gradients() -> list[Tensor]:
        for s in compiled.active_slices():
            s.grad = None
        loss_of(compiled(**batch)).backward()
        return [s.grad.clone() for s in compiled.active_slices() if s.grad is not None]

    wanted = gradients()

    def fail(inputs: list[Any]) -> Any:
        raise RuntimeError("out of memory, say")

    with monkeypatch.context() as patch:
        patch.setattr(compiled.program.variants[4], "run_backward", fail)
        with pytest.raises(RuntimeError, match="say"):
            gradients()
    pool = compiled._training.engines.saved.pool
    assert pool.nbytes == pool.free_nbytes
    for a, b in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_fetched_values_are_whole_although_their_memory_was_in_use() -> None:
    """Host buffers and device blocks pass from value to value without the CPU ever waiting."""
    device = torch.device("cuda", torch.cuda.current_device())
    carrier = SavedValues(open_link(device), open_link(device), HostTier(device))
    shape = (4096, 4096)
    for step in range(8):
        value = torch.full(shape, float(step), device="cuda")
        host = carrier.offload([value], 0)
        carrier.release(0)
        del value
        torch.full(shape, -1.0, device="cuda")  # takes the value's block
        copies = carrier.fetch(host, 1)
        del host  # the next step's offload takes the buffer
        carrier.wait(1)
        assert bool((copies[0] == step).all())
    assert carrier.pool.nbytes == 4096 * 4096 * 4

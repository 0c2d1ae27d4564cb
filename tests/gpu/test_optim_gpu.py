"""AdamW with states streamed over two copy streams and updated by the kernel, against the same steps on the CPU."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

import chunkft_fx
from chunkft_fx.copies import host_memory
from chunkft_fx.copies.states import batches as stage_batches
from chunkft_fx.copies.states.stage import make_stage
from chunkft_fx.errors import ModelChanged
from chunkft_fx.optim.rules.adamw import AdamW
from chunkft_fx.optim.states.host_states import HostStates
from tests.support.small_net import compiled, feed, net

pytestmark = pytest.mark.gpu


def assert_close(cpu: AdamW, gpu: AdamW, state_dtype: str) -> None:
    # The kernel and torch's AdamW round differently in the last bits of float32, and each such bit may carry a
    # stochastic rounding over to the other of two bfloat16 neighbours.
    a, b = cpu.state_dict()["state"], gpu.state_dict()["state"]
    assert a.keys() == b.keys()
    for i, state in a.items():
        assert state["slice_steps"] == b[i]["slice_steps"]
        for key in state.keys() - {"step", "slice_steps"}:
            assert b[i][key].is_pinned()
            assert b[i][key].dtype == state[key].dtype
            rtol, atol = (1e-5, 1e-6) if state_dtype == "float32" else (2**-5, 2e-3)
            torch.testing.assert_close(state[key], b[i][key], rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("chunks", "interval"), [(1, 1), (5, 1), (5, 3)])
def test_streamed_states_equal_those_of_the_cpu(
    dtype: torch.dtype, state_dtype: str, chunks: int, interval: int
) -> None:
    first, second = (compiled(net(dtype), chunks, "random", interval) for _ in range(2))
    second.cuda()
    cpu, gpu = (
        AdamW(m, lr=0.02, weight_decay=0.1, max_grad_norm=1.0, state_dtype=state_dtype) for m in (first, second)
    )
    for step in range(20):
        for module, optimizer in ((first, cpu), (second, gpu)):
            feed(module, step)
            optimizer.step()
        if step in (0, 7):
            assert_close(cpu, gpu, state_dtype)
    assert_close(cpu, gpu, state_dtype)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        tolerance = 1e-5 if dtype != torch.bfloat16 and state_dtype == "float32" else 1e-2
        torch.testing.assert_close(p, q.cpu(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.99)])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_streamed_remainders_equal_float32_masters(state_dtype: str, betas: tuple[float, float]) -> None:
    saved = []
    for master in ("float32", "remainder"):
        module = compiled(net(torch.bfloat16), 5, "random", 2)
        module.cuda()
        optimizer = AdamW(module, lr=0.02, betas=betas, state_dtype=state_dtype, master=master, max_grad_norm=1.0)
        for step in range(40):
            feed(module, step)
            optimizer.step()
        saved.append(optimizer.state_dict()["state"])
    assert saved[0].keys() == saved[1].keys()
    for i, state in saved[0].items():
        assert state.keys() == saved[1][i].keys()
        assert ("exp_avg" in state) == (betas[0] != 0)
        assert all(torch.equal(state[key], saved[1][i][key]) for key in state.keys() - {"slice_steps"})


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_resume_on_the_gpu_equals_an_uninterrupted_run(state_dtype: str) -> None:
    straight, broken = (compiled(net(torch.bfloat16), 5).cuda() for _ in range(2))
    whole, first = (AdamW(m, state_dtype=state_dtype) for m in (straight, broken))
    for step in range(14):
        feed(straight, step)
        whole.step()
    for step in range(7):
        feed(broken, step)
        first.step()
    second = AdamW(broken, state_dtype=state_dtype)
    second.load_state_dict(first.state_dict())
    for step in range(7, 14):
        feed(broken, step)
        second.step()
    for p, q in zip(straight.parameters(), broken.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("states", ["keep", "reset"])
def test_a_model_moves_before_its_first_step_and_not_after(states: str) -> None:
    stays, moves = compiled(net(torch.bfloat16), 3), compiled(net(torch.bfloat16), 3)
    cpu, moved = (AdamW(m, states=states) for m in (stays, moves))
    moves.to("cuda")
    for step in range(9):
        for module, optimizer in ((stays, cpu), (moves, moved)):
            feed(module, step)
            optimizer.step()
    for p, q in zip(stays.parameters(), moves.parameters(), strict=True):
        assert q.is_cuda
        torch.testing.assert_close(p, q.cpu(), rtol=1e-2, atol=1e-2)
    with pytest.raises(ModelChanged, match="cannot be moved to cuda"):
        stays.to("cuda")
    assert not any(p.is_cuda for p in stays.parameters())


@pytest.mark.parametrize("states", ["keep", "reset"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_device_memory_is_that_of_one_chunk(states: str, state_dtype: str) -> None:
    module = compiled(net(), 5).cuda()
    before = torch.cuda.memory_allocated()
    optimizer = AdamW(module, states=states, state_dtype=state_dtype)
    for step in range(10):
        feed(module, step)
        optimizer.step()
        optimizer.zero_grad()
    capacity = optimizer._states.capacity()
    assert capacity <= torch.cuda.memory_allocated() - before < capacity + 512


def test_reset_states_equal_those_of_the_cpu() -> None:
    first, second = (compiled(net(torch.bfloat16), 4, "random", 3) for _ in range(2))
    second.cuda()
    cpu, gpu = (AdamW(m, lr=0.02, states="reset") for m in (first, second))
    for step in range(24):
        for module, optimizer in ((first, cpu), (second, gpu)):
            feed(module, step)
            optimizer.step()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q.cpu(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_weights_in_host_memory_are_up_to_date_after_a_step(dtype: torch.dtype, pinned: bool) -> None:
    model = net(dtype)
    for p in model.parameters():
        p.data = p.data.pin_memory() if pinned else p.data
    first = compiled(net(dtype), 3)
    second = chunkft_fx.compile(model, "1GB", chunks=3, interval=1, backend="eager", device="cuda")
    cpu, gpu = AdamW(first, lr=0.02, max_grad_norm=1.0), AdamW(second, lr=0.02, max_grad_norm=1.0)
    for step in range(9):
        for module, optimizer in ((first, cpu), (second, gpu)):
            feed(module, step)
            optimizer.step()
        tolerance = 1e-5 if dtype != torch.bfloat16 else 1e-2
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            assert q.device.type == "cpu"
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def test_a_step_makes_backwards_through_the_old_weights_stale() -> None:
    module = compiled(net(torch.bfloat16), 2).cuda()
    optimizer = AdamW(module)
    feed(module, 0)
    updated = [s.parameter for s in module.active_slices()]
    before = [p._version for p in updated]
    optimizer.step()
    assert all(p._version > v for p, v in zip(updated, before, strict=True))


def test_pinned_memory_of_a_dropped_optimizer_goes_back_to_the_system() -> None:
    def pinned_nbytes() -> int:
        return sum(len(pages) for pages in gc.get_objects() if type(pages) is host_memory._Pages)

    module = compiled(net(torch.bfloat16), 2).cuda()
    optimizer = AdamW(module)
    for step in range(3):
        feed(module, step)
        optimizer.step()
    before = pinned_nbytes()
    needed = HostStates(list(module.parameters()), optimizer.spec).nbytes(pinned=True)
    del optimizer
    gc.collect()
    assert pinned_nbytes() <= before - needed
    assert before >= needed > 0


def host_chunks(nbytes: int, count: int) -> list[Tensor]:
    return [torch.full((nbytes // 4,), float(i), pin_memory=True) for i in range(count)]


def test_large_chunks_are_exchanged_without_mixing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_batches, "BATCH_NBYTES", 2**20)
    chunks = host_chunks(256 * 2**20, 3)
    stage = make_stage(torch.device("cuda"), 256 * 2**20)
    for step in range(12):
        stage.announce([chunks[step % 3]])
        stage.tensors()[0].add_(10)
        stage.write_back()
    stage.synchronize()
    for i, chunk in enumerate(chunks):
        assert bool((chunk == 40 + i).all())


def test_both_directions_run_at_once() -> None:
    nbytes = 2 * 2**30
    chunks = host_chunks(nbytes, 2)
    stage = make_stage(torch.device("cuda"), nbytes)

    def best_seconds(exchanges: bool) -> float:
        best = float("inf")
        for step in range(5):
            stage.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            if exchanges:
                stage.write_back()
            stage.announce([chunks[step % 2]])
            stage.tensors()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3)
        return best

    one_way = best_seconds(exchanges=False)
    # In turn they would take twice as long; both at once share the link (47 of 51.7 GiB/s each on one H200).
    assert best_seconds(exchanges=True) < 1.4 * one_way

"""State streaming without a GPU: the CUDA stage with streams that do everything at once, and pinned slabs."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from chunkft_fx import host_memory
from chunkft_fx.host_memory import HostMemory
from chunkft_fx.optim import AdamW
from chunkft_fx.streaming import CudaStage, Stage
from tests.fake_model import FakeModule, net, train_step

CPU = torch.device("cpu")


class ImmediateStream:
    """A stream on which work is done when it is queued; it counts what was waited for."""

    def __init__(self, device: object = None) -> None:
        self.waits = 0

    def wait_stream(self, other: ImmediateStream) -> None:
        self.waits += 1

    def synchronize(self) -> None:
        self.waits += 1


@pytest.fixture
def compute(monkeypatch: pytest.MonkeyPatch) -> ImmediateStream:
    """The current stream, in a world where CUDA streams exist on the CPU."""
    stream = ImmediateStream()
    monkeypatch.setattr(torch.cuda, "Stream", ImmediateStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    return stream


def test_the_stage_copies_in_and_back(compute: ImmediateStream) -> None:
    host = [torch.arange(6.0).reshape(2, 3), torch.ones(5, dtype=torch.float64), torch.full((1,), 7.0)]
    stage = CudaStage(CPU, 0)
    stage.fetch(host)
    staged = stage.tensors()
    assert compute.waits == 1
    for h, s in zip(host, staged, strict=True):
        assert torch.equal(h, s)
        assert h.dtype == s.dtype
        assert s.data_ptr() % 8 == 0
        s.add_(1)
    assert host[0][0, 0] == 0
    stage.write_back()
    assert host[0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert host[1].tolist() == [2] * 5
    assert host[2].tolist() == [8]


def test_the_stage_takes_memory_once_for_the_largest_chunk(compute: ImmediateStream) -> None:
    stage = CudaStage(CPU, 1024)
    stage.fetch([torch.ones(8)])
    first = stage.tensors()[0].data_ptr()
    stage.fetch([torch.ones(60), torch.ones(100)])
    assert stage.tensors()[0].data_ptr() == first
    assert stage.tensors()[1].data_ptr() == first + 256
    stage.fetch([torch.arange(400.0)])  # more than was promised: the stage grows
    assert torch.equal(stage.tensors()[0], torch.arange(400.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interval", [1, 3])
def test_training_through_the_stage_equals_training_in_place(
    compute: ImmediateStream, dtype: torch.dtype, interval: int
) -> None:
    inplace, staged = FakeModule(net(dtype), 5, "random", interval), FakeModule(net(dtype), 5, "random", interval)
    a, b = AdamW(inplace, max_grad_norm=0.1), AdamW(staged, max_grad_norm=0.1)
    assert type(a._stage) is Stage
    b._stage = CudaStage(CPU, b._capacity())
    for step in range(17):
        train_step(inplace, a, step, dtype)
        train_step(staged, b, step, dtype)
        if step in (4, 9):  # in the midst of an interval: host memory must be brought up to date
            same_state(a.state_dict(), b.state_dict())
        if step == 11:  # a chunk whose states were not fetched ahead
            for module in (inplace, staged):
                module.schedule.activate((module.schedule.chunk + 2) % 5)
                module._slices = ()
    same_state(a.state_dict(), b.state_dict())
    for p, q in zip(inplace.parameters(), staged.parameters(), strict=True):
        assert torch.equal(p, q)


def same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["state"].keys() == b["state"].keys()
    for i, state in a["state"].items():
        for key, value in state.items():
            other = b["state"][i][key]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other


def test_the_capacity_is_what_the_largest_chunk_takes(compute: ImmediateStream) -> None:
    module = FakeModule(net(), 5)
    optimizer = AdamW(module)
    optimizer._stage = stage = CudaStage(CPU, optimizer._capacity())
    train_step(module, optimizer, 0, torch.float32)
    first = stage._arena
    for step in range(1, 10):
        train_step(module, optimizer, step, torch.float32)
    assert stage._arena is first


def test_pinned_memory_is_carved_from_zeroed_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    slabs: list[int] = []
    zeros = torch.zeros

    def pinned_zeros(numel: int, *, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        assert pin_memory
        slabs.append(numel * dtype.itemsize)
        return zeros(numel, dtype=dtype)

    monkeypatch.setattr(host_memory, "SMALLEST_SLAB", 1024)
    monkeypatch.setattr(host_memory, "LARGEST_SLAB", 4096)
    monkeypatch.setattr(torch, "zeros", pinned_zeros)
    memory = HostMemory()
    taken = [memory.zeros((n, 10), torch.float32, pinned=True) for n in (10, 10, 30, 2, 150, 60)]
    taken.append(memory.zeros((3,), torch.float64, pinned=True))
    # 400 + 400 + 80 bytes fit the first slab, 1200 the second; 6000 need a larger one, and float64 has its own.
    assert slabs == [1024, 2048, 8192, 4096, 1024]
    for i, t in enumerate(taken):
        assert not t.any()
        t.fill_(i + 1)
    assert all(bool((t == i + 1).all()) for i, t in enumerate(taken))
    assert all(t.is_contiguous() for t in taken)


def test_memory_that_is_not_pinned_is_plain() -> None:
    t = HostMemory().zeros((2, 3), torch.float64, pinned=False)
    assert (t.shape, t.dtype, t.any().item()) == ((2, 3), torch.float64, False)

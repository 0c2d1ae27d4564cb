"""AdamW with states streamed through the copy stream, against the same steps on the CPU."""

from __future__ import annotations

import pytest
import torch

from chunkft_fx.optim import AdamW
from chunkft_fx.optim_state import state_dtype
from tests.fake_model import FakeModule, net

pytestmark = pytest.mark.gpu


def feed(module: FakeModule, step: int) -> None:
    """The same random gradients on every device, so that only the update differs."""
    generator = torch.Generator().manual_seed(step)
    for s in module.active_slices():
        gradient = torch.randn(s.weight().shape, generator=generator, dtype=torch.float64)
        s.grad = gradient.to(s.parameter.device, state_dtype(s.parameter))


def assert_close(cpu: AdamW, gpu: AdamW) -> None:
    # Fused and plain AdamW round differently in the last bits of float32.
    a, b = cpu.state_dict()["state"], gpu.state_dict()["state"]
    assert a.keys() == b.keys()
    for i, state in a.items():
        assert state["slice_steps"] == b[i]["slice_steps"]
        for key in state.keys() - {"step", "slice_steps"}:
            assert b[i][key].is_pinned()
            torch.testing.assert_close(state[key], b[i][key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("chunks", "interval"), [(1, 1), (5, 1), (5, 3)])
def test_streamed_states_equal_those_of_the_cpu(dtype: torch.dtype, chunks: int, interval: int) -> None:
    first, second = (FakeModule(net(dtype), chunks, "random", interval) for _ in range(2))
    second.cuda()
    cpu, gpu = (AdamW(m, lr=0.02, weight_decay=0.1, max_grad_norm=1.0) for m in (first, second))
    for step in range(20):
        for module, optimizer in ((first, cpu), (second, gpu)):
            feed(module, step)
            optimizer.step()
        if step in (0, 7):
            assert_close(cpu, gpu)
    assert_close(cpu, gpu)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        tolerance = 1e-5 if dtype != torch.bfloat16 else 1e-2
        torch.testing.assert_close(p, q.cpu(), rtol=tolerance, atol=tolerance)


def test_resume_on_the_gpu_equals_an_uninterrupted_run() -> None:
    straight, broken = (FakeModule(net(torch.bfloat16), 5).cuda() for _ in range(2))
    whole, first = AdamW(straight), AdamW(broken)
    for step in range(14):
        feed(straight, step)
        whole.step()
    for step in range(7):
        feed(broken, step)
        first.step()
    second = AdamW(broken)
    second.load_state_dict(first.state_dict())
    for step in range(7, 14):
        feed(broken, step)
        second.step()
    for p, q in zip(straight.parameters(), broken.parameters(), strict=True):
        assert torch.equal(p, q)


def test_moving_the_model_takes_the_states_along() -> None:
    stays, moves = FakeModule(net(torch.bfloat16), 3), FakeModule(net(torch.bfloat16), 3)
    cpu, moved = AdamW(stays), AdamW(moves)
    for step in range(9):
        if step in (2, 6):
            moves.to("cuda" if step == 2 else "cpu")
        for module, optimizer in ((stays, cpu), (moves, moved)):
            feed(module, step)
            optimizer.step()
    for p, q in zip(stays.parameters(), moves.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-2)


def test_device_memory_is_that_of_one_chunk() -> None:
    module = FakeModule(net(), 5).cuda()
    before = torch.cuda.memory_allocated()
    optimizer = AdamW(module)
    for step in range(10):
        feed(module, step)
        optimizer.step()
        optimizer.zero_grad()
    capacity = optimizer._capacity()
    assert capacity <= torch.cuda.memory_allocated() - before < capacity + 512

"""Optimizers whose updates are torch's operators, with staged states and host weights on CUDA, against the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import chunkft_fx
from chunkft_fx.optim import update as updates
from chunkft_fx.optim.optimizer import ChunkedOptimizer
from tests.support.small_net import compiled, feed, net

pytestmark = pytest.mark.gpu

OPTIONS: dict[type[ChunkedOptimizer], dict[str, Any]] = {
    chunkft_fx.SGD: {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    chunkft_fx.Adafactor: {"lr": 0.02, "weight_decay": 0.1},
}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def same_states(cpu: ChunkedOptimizer, gpu: ChunkedOptimizer) -> None:
    a, b = cpu.state_dict()["state"], gpu.state_dict()["state"]
    assert a.keys() == b.keys()
    for i, state in a.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(value, b[i][key].cpu(), rtol=1e-4, atol=1e-5)
            else:
                assert value == b[i][key]


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("kind", list(OPTIONS))
@pytest.mark.parametrize("states", ["keep", "reset"])
@pytest.mark.parametrize("where", ["device", "pinned", "host"])
def test_updates_equal_those_of_the_cpu(
    kind: type[ChunkedOptimizer], dtype: torch.dtype, states: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "PART_NUMEL", 50)  # so that slices are taken apart
    model = net(dtype)
    first = compiled(net(dtype), 4, "random", 2)
    cpu: Any = kind(first, **OPTIONS[kind], max_grad_norm=1.0, states=states)  # type: ignore[call-arg]
    if where == "device":
        second = compiled(model, 4, "random", 2).cuda()
    else:
        for p in model.parameters():
            p.data = p.data.pin_memory() if where == "pinned" else p.data
        second = chunkft_fx.compile(model, "1GB", chunks=4, order="random", interval=2, backend="eager", device="cuda")
    gpu: Any = kind(second, **OPTIONS[kind], max_grad_norm=1.0, states=states)  # type: ignore[call-arg]
    for step in range(16):
        for module, optimizer in ((first, cpu), (second, gpu)):
            feed(module, step)
            held = [s.grad for s in module.active_slices() if s.grad is not None]
            before = [g.clone() for g in held]
            optimizer.step()
            assert all(torch.equal(g, h) for g, h in zip(held, before, strict=True))
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            torch.testing.assert_close(p, q.cpu(), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    if states == "keep":
        same_states(cpu, gpu)

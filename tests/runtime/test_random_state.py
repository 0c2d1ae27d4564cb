"""The random state that a step takes and puts back is that of the device that its model runs on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chunkft_fx.runtime import random_state


def test_earlier_states_are_used_inside_and_present_ones_put_back() -> None:
    cpu = torch.device("cpu")
    before = random_state.taken(cpu)
    first = torch.rand(3)
    torch.rand(5)
    present = torch.random.get_rng_state()
    with random_state.restored(before, cpu):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.random.get_rng_state(), present)
    with random_state.restored(None, cpu):
        assert torch.equal(torch.random.get_rng_state(), present)


def test_states_are_of_the_models_device_and_not_of_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices are stood in for by a table of their states."""
    states = {torch.device("cuda", i): torch.tensor([i]) for i in range(3)}

    def get(device: torch.device) -> Tensor:
        return states[device]

    def put(state: Tensor, device: torch.device) -> None:
        states[device] = state

    monkeypatch.setattr(torch.cuda, "get_rng_state", get)
    monkeypatch.setattr(torch.cuda, "set_rng_state", put)
    device = torch.device("cuda", 2)
    before = random_state.taken(device)
    states[device] = torch.tensor([7])
    with random_state.restored(before, device):
        assert int(states[device]) == 2
    assert [int(s) for s in states.values()] == [0, 1, 7]

"""The allocator settings that a budget asks for, beside those of the user."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chunkft_fx.machine import memory_limit
from chunkft_fx.machine.memory_limit import ADDED, DEFAULT, Allocator, Limits, explained
from chunkft_fx.machine.overhead import PAGE_ROUNDING_NBYTES

GIB = 2**30


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ("", [ADDED, DEFAULT]),
        ("max_split_size_mb:64", [f"max_split_size_mb:64,{setting}" for setting in (ADDED, DEFAULT)]),
        ("max_split_size_mb:64,expandable_segments:False", []),
        ("expandable_segments:True", []),
    ],
)
@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_users_settings_stay(
    allocator: Recorded, monkeypatch: pytest.MonkeyPatch, name: str, given: str, settings: list[str]
) -> None:
    monkeypatch.setenv(name, given)
    limits, owner = Limits(allocator), nn.Module()
    limits.set_up(owner, torch.device("cuda", 0))
    assert allocator.settings == settings[:1]
    del owner
    assert allocator.settings == settings


def test_the_cpu_has_nothing_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("another device's allocator was changed")

    monkeypatch.setattr(memory_limit, "set_allocator", refuse)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", refuse)
    owner = nn.Module()
    memory_limit.LIMITS.set_up(owner, torch.device("cpu"))
    memory_limit.LIMITS.hold(owner, torch.device("cpu"), 2**30)


class Recorded(Allocator):
    """An allocator of devices of 100 GiB that remembers what was asked of it."""

    def __init__(self) -> None:
        self.fractions: dict[torch.device, float] = {}
        self.settings: list[str] = []

    def fraction(self, device: torch.device) -> float:
        return self.fractions.get(device, 0.9)

    def set_fraction(self, device: torch.device, fraction: float) -> None:
        self.fractions[device] = fraction

    def total_nbytes(self, device: torch.device) -> int:
        return 100 * GIB

    def is_native(self) -> bool:
        return True

    def set_up(self, settings: str) -> None:
        self.settings.append(settings)

    def give_back(self, device: torch.device) -> None:
        pass

    def give_back_workspaces(self, device: torch.device) -> None:
        pass


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    return Recorded()


def _share(budget: int) -> float:
    return (budget - PAGE_ROUNDING_NBYTES) / (100 * GIB)


def test_models_side_by_side_may_take_the_sum_of_their_budgets(allocator: Recorded) -> None:
    limits, device = Limits(allocator), torch.device("cuda", 0)
    first, second = nn.Module(), nn.Module()
    limits.hold(first, device, 10 * GIB)
    limits.hold(second, device, 20 * GIB)
    assert allocator.fractions[device] == _share(30 * GIB)
    limits.hold(second, device, 5 * GIB)  # planned again
    assert allocator.fractions[device] == _share(15 * GIB)
    del second
    assert allocator.fractions[device] == _share(10 * GIB)


def test_limits_and_settings_end_with_the_last_model(allocator: Recorded) -> None:
    limits, devices = Limits(allocator), [torch.device("cuda", i) for i in (0, 1)]
    owners = [nn.Module(), nn.Module()]
    for owner, device in zip(owners, devices, strict=True):
        limits.set_up(owner, device)
        limits.hold(owner, device, 10 * GIB)
    assert allocator.settings == [ADDED]
    del owner
    owners.pop(0)
    assert allocator.fractions == {devices[0]: 0.9, devices[1]: _share(10 * GIB)}
    assert allocator.settings == [ADDED]
    owners.clear()
    assert allocator.fractions == dict.fromkeys(devices, 0.9)
    assert allocator.settings == [ADDED, DEFAULT]


def test_a_hundred_models_one_after_the_other_leave_nothing(allocator: Recorded) -> None:
    limits, device = Limits(allocator), torch.device("cuda", 0)
    for _ in range(100):
        owner = nn.Module()
        limits.set_up(owner, device)
        limits.hold(owner, device, GIB)
        assert allocator.fractions[device] == _share(GIB)
        del owner
    assert allocator.fractions[device] == 0.9
    assert not limits._budgets


def test_an_out_of_memory_error_keeps_its_type_and_says_what_was_needed() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught, explained(lambda: "the plan needs 3 bytes"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "the plan needs 3 bytes" in caught.value.__notes__[0]

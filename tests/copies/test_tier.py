"""The host tier: zeros that last, pinned slabs, weights that move there with their strides, copies over a link."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chunkft_fx.copies import host_memory, tier
from chunkft_fx.copies.link import Link
from chunkft_fx.copies.tier import HostTier

CPU = torch.device("cpu")


def test_pinned_memory_is_carved_from_zeroed_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    slabs: list[int] = []

    def pinned_zeros(nbytes: int, device: torch.device) -> Tensor:
        assert device.type == "cuda"
        slabs.append(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(tier, "SMALLEST_SLAB", 1024)
    monkeypatch.setattr(tier, "LARGEST_SLAB", 4096)
    monkeypatch.setattr(tier, "pinned_zeros", pinned_zeros)
    monkeypatch.setattr(host_memory, "PAGE_NBYTES", 512)
    memory = HostTier(torch.device("cuda"))
    taken = [memory.allocate((n, 10), torch.float32) for n in (10, 10, 30, 2, 150, 60)]
    taken.append(memory.allocate((3,), torch.float64))
    # 400 + 400 + 80 bytes fit the first slab, 1200 the second; 6000 need a larger one, and float64 has its own.
    assert slabs == [1024, 2048, 6144, 4096, 1024]
    for i, t in enumerate(taken):
        assert not t.any()
        t.fill_(i + 1)
    assert all(bool((t == i + 1).all()) for i, t in enumerate(taken))
    assert all(t.is_contiguous() for t in taken)


def test_memory_that_is_not_pinned_is_plain() -> None:
    t = HostTier(CPU).allocate((2, 3), torch.float64)
    assert (t.shape, t.dtype, t.any().item()) == ((2, 3), torch.float64, False)


@pytest.mark.parametrize(
    ("weight", "strides"),
    [
        (torch.randn(4, 6), (6, 1)),
        (torch.randn(4, 6).t(), (1, 6)),
        (torch.randn(2, 3, 4).permute(2, 0, 1), (1, 12, 4)),
        (torch.randn(4, 6)[:, ::2], (3, 1)),  # no run of memory
        (torch.tensor(2.0), ()),
    ],
)
def test_a_weight_from_elsewhere_is_copied_with_its_strides(
    monkeypatch: pytest.MonkeyPatch, weight: Tensor, strides: tuple[int, ...]
) -> None:
    monkeypatch.setattr(tier, "pinned_zeros", lambda nbytes, device: torch.zeros(nbytes, dtype=torch.uint8))
    host = HostTier(torch.device("cuda"))  # nothing here is pinned: every weight lies elsewhere
    moved = host.moved(weight)
    assert moved.data_ptr() != weight.data_ptr()
    assert moved.stride() == strides
    assert torch.equal(moved, weight)


def test_a_weight_that_lies_there_stays() -> None:
    weight = torch.randn(3, 4)
    assert HostTier(CPU).moved(weight) is weight


def test_bytes_go_out_and_come_back() -> None:
    host, link = HostTier(CPU), Link(CPU)
    value = torch.randn(3, 4)
    kept, back = host.allocate((3, 4), torch.float32), torch.empty(3, 4)
    host.copy_out(link, [value], [kept])
    host.copy_in(link, [kept], [back])
    assert torch.equal(back, value)
    assert torch.equal(kept, value)

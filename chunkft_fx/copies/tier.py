"""Tier: keeps tensors beside the compute device until their turn; says how their bytes get there and back.

A tier says *where* bytes lie, a link (`copies.link`) *when* they move. The weight ring, saved values and the
optimizer's stage reach what a tier keeps only through ``copy_in`` and ``copy_out``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from chunkft_fx.copies.host_memory import paged, pinned_zeros
from chunkft_fx.copies.link import Link

# Pinned slabs grow up to this size.
SMALLEST_SLAB = 64 * 2**20
LARGEST_SLAB = 2**30


class Tier(Protocol):
    """A place where tensors wait for their turn on the compute device."""

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of zeros in this tier, which lasts as long as someone holds it."""

    def copy_in(self, link: Link, kept: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Begin to copy tensors of this tier to targets on the compute device: copies as `Link` promises them."""

    def copy_out(self, link: Link, sources: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
        """Begin to copy tensors from the compute device into tensors of this tier: copies as `Link` promises them."""


class HostTier:
    """Host memory beside a device: pinned and carved from slabs where the device is a GPU, plain beside a CPU.

    Slabs are taken as they are needed: pinning has a cost for each call, and for each GiB.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.is_pinned = device.type == "cuda"
        self._slabs: dict[torch.dtype, list[Tensor]] = {}  # the unused rest of each slab

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous host tensor of zeros, which lasts as long as someone holds it."""
        if not self.is_pinned:
            return torch.zeros(shape, dtype=dtype)
        numel = prod(shape)
        slabs = self._slabs.setdefault(dtype, [])
        for i, rest in enumerate(slabs):
            if rest.numel() >= numel:
                slabs[i] = rest[numel:]
                return rest[:numel].view(shape)
        taken = self._new_slab(numel, dtype)
        slabs.append(taken[numel:])
        return taken[:numel].view(shape)

    def copy_in(self, link: Link, kept: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Begin to copy host tensors to the compute device."""
        link.copy(kept, targets)

    def copy_out(self, link: Link, sources: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
        """Begin to copy tensors from the compute device into host tensors."""
        link.copy(sources, kept)

    def moved(self, weight: Tensor) -> Tensor:
        """A weight's value in this tier: the weight itself if it lies there, else a copy that is complete on return.

        The copy has the weight's strides if that is one run of memory, else it is contiguous.
        """
        if weight.device.type == "cpu" and (not self.is_pinned or weight.is_pinned()):
            return weight
        run = self.allocate((weight.numel(),), weight.dtype)
        strides: tuple[int, ...] = weight.stride()
        order = sorted(range(weight.ndim), key=lambda d: -strides[d])
        is_run = weight.permute(order).is_contiguous()
        host = run.as_strided(weight.shape, weight.stride()) if is_run else run.view(weight.shape)
        return host.copy_(weight.detach())

    def _new_slab(self, numel: int, dtype: torch.dtype) -> Tensor:
        grown = min(SMALLEST_SLAB << len(self._slabs[dtype]), LARGEST_SLAB)
        return pinned_zeros(max(grown, paged(numel * dtype.itemsize)), self._device).view(dtype)

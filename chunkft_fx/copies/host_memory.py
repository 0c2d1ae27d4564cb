"""Host memory that lasts: weights and optimizer states that wait for their turn, pinned when a GPU reads them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

# Pinned slabs are powers of two (torch's pinned allocator rounds up to them) and grow up to this size.
SMALLEST_SLAB = 64 * 2**20
LARGEST_SLAB = 2**30


class HostMemory:
    """Host tensors that live as long as someone holds them; pinned ones are carved from slabs.

    Pinning costs about 0.5 s a GiB and a call, and torch rounds each pinned tensor up to a power of two;
    slabs taken as they are needed avoid both waste and waiting for all memory at once.
    """

    def __init__(self) -> None:
        self._slabs: dict[torch.dtype, list[Tensor]] = {}  # the unused rest of each slab

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, pinned: bool) -> Tensor:
        """A contiguous host tensor of zeros."""
        if not pinned:
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

    def _new_slab(self, numel: int, dtype: torch.dtype) -> Tensor:
        grown = min(SMALLEST_SLAB << len(self._slabs[dtype]), LARGEST_SLAB)
        nbytes = max(grown, 1 << (numel * dtype.itemsize - 1).bit_length())
        return torch.zeros(nbytes // dtype.itemsize, dtype=dtype, pin_memory=True)

    def like(self, source: Tensor, pinned: bool) -> Tensor:
        """A host copy of ``source``, with its strides if it is one run of memory, else contiguous."""
        run = self.zeros((source.numel(),), source.dtype, pinned)
        strides: tuple[int, ...] = source.stride()
        order = sorted(range(source.ndim), key=lambda d: -strides[d])
        is_run = source.permute(order).is_contiguous()
        host = run.as_strided(source.shape, source.stride()) if is_run else run.view(source.shape)
        return host.copy_(source.detach())

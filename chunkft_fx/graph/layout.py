"""Says how tensors lie in memory: rows of a stage, runs without gaps, the cut dimension in front, the wide dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Staged tensors start at multiples of this many bytes, as the CUDA allocator's own do.
STAGE_ALIGNMENT = 256
# So many neighbours in an 8-bit state share a scale, at most (`kernels.blocks`).
BLOCK_NUMEL = 256


def blocks_of(numel: int) -> int:
    """The blocks of an 8-bit state that hold ``numel`` elements, the elements of one index of the cut dimension."""
    return -(-numel // BLOCK_NUMEL)


def stage_nbytes(nbytes: int) -> int:
    """The bytes that a tensor of ``nbytes`` takes on the stage."""
    return -(-nbytes // STAGE_ALIGNMENT) * STAGE_ALIGNMENT


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which losses, sums and gradients of a dtype are kept: itself, but float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def run_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """The strides of one run of memory, without gaps, in which dimensions come in the order of ``strides``.

    They equal ``strides``, except in dimensions of size 1, for a tensor that is such a run itself.
    """
    found = [0] * len(shape)
    step = 1
    for d in sorted(range(len(shape)), key=lambda d: (strides[d], -d)):
        found[d] = step
        step *= shape[d]
    return tuple(found)


def size_along(parameter: Tensor, dim: int) -> int:
    """The number of indices along ``dim``; a scalar has one."""
    return parameter.shape[dim] if parameter.ndim else 1


def front(t: Tensor, dim: int) -> Tensor:
    """A view with the cut dimension in front, without autograd; a scalar becomes one index."""
    return t.detach().movedim(dim, 0) if t.ndim else t.detach().view(1)

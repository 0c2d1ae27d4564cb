"""Prepares a launch: checks that the kernel can reach the memory, and copies its table to the device.

A launch covers many tensors, so the kernel finds their addresses in a table: an int64 tensor with one row a
tensor, built on the host and copied once, asynchronously, from pinned memory. In front of the rows stand, close
together, the numbers of tiles up to each row's end: every program walks over all of them. Addresses of pinned host
memory are valid on the device as they are (unified addressing).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chunkft_fx.errors import OptionError

# Widest access of one thread; kernels use it where every address is a multiple of it.
ACCESS_NBYTES = 16


@dataclass(frozen=True)
class LaunchOptions:
    """How a launch is cut up: elements of one tile, warps of one program, and how many programs share the tiles.

    Programs are counted for each multiprocessor when all memory is on the device (``per_multiprocessor``), and
    in all when some of it is the host's (``on_host``): few of them fill the link, and more would only take
    registers and L1 from work beside them.
    """

    tile: int = 1024
    num_warps: int = 8
    per_multiprocessor: int = 8
    on_host: int = 96

    def programs(self, tiles: int, device: torch.device, host: bool) -> int:
        """The number of programs for ``tiles`` tiles; ``host`` says that some of the memory is the host's."""
        if host or device.type != "cuda":
            return min(tiles, self.on_host)
        return min(tiles, self.per_multiprocessor * torch.cuda.get_device_properties(device).multi_processor_count)


def require_reachable(tensor: Tensor, device: torch.device, what: str) -> None:
    """Refuse memory that a kernel on ``device`` would fault on: another device's, or unpinned host memory."""
    if tensor.device == device or (tensor.device.type == "cpu" and tensor.is_pinned()):
        return
    raise OptionError(f"{what} is on {tensor.device}; a kernel on {device} needs it there or in pinned host memory")


def is_aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors begin at a multiple of ``ACCESS_NBYTES``."""
    return all(t.data_ptr() % ACCESS_NBYTES == 0 for t in tensors)


def join_dims(tensors: Sequence[Tensor]) -> tuple[list[int], list[list[int]]]:
    """The sizes and each tensor's strides of the fewest dimensions that describe tensors of one shape.

    Neighbouring dimensions become one where in every tensor they are one progression of addresses; dimensions
    of size one disappear, and one dimension is left at least.
    """
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for dim, size in enumerate(tensors[0].shape):
        if size == 1:
            continue
        steps = [t.stride(dim) for t in tensors]
        if sizes and all(s[-1] == step * size for s, step in zip(strides, steps, strict=True)):
            sizes[-1] *= size
            for s, step in zip(strides, steps, strict=True):
                s[-1] = step
        else:
            sizes.append(size)
            for s, step in zip(strides, steps, strict=True):
                s.append(step)
    assert prod(sizes) == tensors[0].numel()
    return (sizes, strides) if sizes else ([1], [[1] for _ in tensors])


def device_table(numbers: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """The numbers as int64[len(numbers)] on ``device``, without waiting for the copy."""
    table = torch.from_numpy(numbers)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def signed64(value: int) -> int:
    """The int64 with the same lower 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes ``device`` the one on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

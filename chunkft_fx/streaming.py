"""Optimizer state between host and device: the stage where updates happen.

Host tensors keep the cut dimension in front, so that every slice of them is one contiguous run and
moves in one copy. A *stage* holds the states of the active slices where the weights are. On the CPU host
memory is that place: nothing is copied and updates happen in place. On CUDA all copies run on one copy
stream, in order: the copy back of one chunk, then the fetch of the next, both hidden behind the next
forward and backward. One order for both directions needs device memory for one chunk only, and makes
every reuse of a buffer safe by the order of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Staged tensors start at multiples of this many bytes, as the CUDA allocator's own do.
STAGE_ALIGNMENT = 256


class Stage:
    """Where updates happen; this one is host memory itself, for weights on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._host: list[Tensor] = []

    def fetch(self, host: Sequence[Tensor]) -> None:
        """Begin to bring these host tensors in, in place of those staged before, which are forgotten."""
        self._host = list(host)

    def tensors(self) -> list[Tensor]:
        """The staged tensors, in the order of ``fetch``, ready for work on the current stream."""
        return self._host

    def write_back(self) -> None:
        """Begin to copy the staged tensors to the host, after the work on the current stream."""

    def synchronize(self) -> None:
        """Wait until host memory is up to date with every copy begun."""


class CudaStage(Stage):
    """Device memory for the states of one chunk, filled and emptied on a copy stream.

    ``capacity`` is the bytes of the largest chunk: memory is taken once, and again only if more is asked for.
    """

    def __init__(self, device: torch.device, capacity: int) -> None:
        super().__init__(device)
        self._capacity = capacity
        self._copies = torch.cuda.Stream(device)
        self._arena = torch.empty(0, dtype=torch.uint8, device=device)
        self._staged: list[Tensor] = []

    def fetch(self, host: Sequence[Tensor]) -> None:
        self._host = list(host)
        self._capacity = max(self._capacity, sum(stage_nbytes(t.nbytes) for t in host))
        self._copies.wait_stream(torch.cuda.current_stream(self.device))  # it may still use what was staged
        with torch.cuda.stream(self._copies):
            if self._arena.numel() < self._capacity:
                self._staged = []
                self._arena = torch.empty(0, dtype=torch.uint8, device=self.device)  # free before growing
                self._arena = torch.empty(self._capacity, dtype=torch.uint8, device=self.device)
            self._staged = self._carve(host)
            for staged, source in zip(self._staged, host, strict=True):
                staged.copy_(source, non_blocking=True)

    def _carve(self, host: Sequence[Tensor]) -> list[Tensor]:
        staged: list[Tensor] = []
        offset = 0
        for t in host:
            staged.append(self._arena[offset : offset + t.nbytes].view(t.dtype).view(t.shape))
            offset += stage_nbytes(t.nbytes)
        return staged

    def tensors(self) -> list[Tensor]:
        compute = torch.cuda.current_stream(self.device)
        compute.wait_stream(self._copies)
        self._arena.record_stream(compute)
        return self._staged

    def write_back(self) -> None:
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            for staged, target in zip(self._staged, self._host, strict=True):
                target.copy_(staged, non_blocking=True)

    def synchronize(self) -> None:
        self._copies.synchronize()


def stage_nbytes(nbytes: int) -> int:
    """The bytes that a tensor of ``nbytes`` takes on the stage."""
    return -(-nbytes // STAGE_ALIGNMENT) * STAGE_ALIGNMENT

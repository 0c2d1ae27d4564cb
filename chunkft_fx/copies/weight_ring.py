"""The ring: a few buffers on the device through which weights that live in host memory pass.

On CUDA, fetches run on a copy stream: one begins when the work before its node is done (which frees its buffer and
finishes any update of the weights it reads), and its wait makes the compute stream wait for it alone. On the CPU
the same ring is filled by plain copies, so that a program which reused a buffer too early would be wrong there too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chunkft_fx.graph.layout import stage_nbytes


def ring_buffer_nbytes(uses: Sequence[Sequence[Tensor]]) -> int:
    """The bytes of a buffer that holds the tensors of any one use."""
    return max((sum(stage_nbytes(t.numel() * t.element_size()) for t in use) for use in uses), default=0)


class Ring:
    """``depth`` buffers of ``buffer_nbytes`` each, taken from the device when first used."""

    def __init__(self, device: torch.device, depth: int, buffer_nbytes: int) -> None:
        self.device = device
        self.depth = depth
        self.buffer_nbytes = buffer_nbytes
        self._buffers: list[Tensor] = []

    def fetch(self, host: Sequence[Tensor], buffer: int) -> list[Tensor]:
        """Begin to copy these tensors, wherever they lie, into a buffer; the copies have their shapes and strides."""
        while len(self._buffers) < self.depth:
            self._buffers.append(torch.empty(self.buffer_nbytes, dtype=torch.uint8, device=self.device))
        copies: list[Tensor] = []
        offset = 0
        for source in host:
            nbytes = source.numel() * source.element_size()
            run = self._buffers[buffer][offset : offset + nbytes].view(source.dtype)
            copies.append(run.as_strided(source.shape, source.stride()))
            offset += stage_nbytes(nbytes)
        self._copy(host, copies, buffer)
        return copies

    def wait(self, buffer: int) -> None:
        """Let work that follows on the current stream read the buffer."""

    def synchronize(self) -> None:
        """Wait until no copy reads host memory."""

    def streams(self) -> list[torch.cuda.Stream]:
        """The streams that fetches run on."""
        return []

    def abandon(self) -> None:
        """End all fetches under way: the program that began them failed; whoever gets the buffers next comes behind."""

    def _copy(self, host: Sequence[Tensor], copies: Sequence[Tensor], buffer: int) -> None:
        for source, copy in zip(host, copies, strict=True):
            copy.copy_(source)


class CudaRing(Ring):
    """A ring that is filled on a copy stream of its own."""

    def __init__(self, device: torch.device, depth: int, buffer_nbytes: int) -> None:
        super().__init__(device, depth, buffer_nbytes)
        self._copies = torch.cuda.Stream(device)
        self._filled = [torch.cuda.Event() for _ in range(depth)]

    def wait(self, buffer: int) -> None:
        torch.cuda.current_stream(self.device).wait_event(self._filled[buffer])

    def synchronize(self) -> None:
        self._copies.synchronize()

    def streams(self) -> list[torch.cuda.Stream]:
        return [self._copies]

    def abandon(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self._copies)

    def _copy(self, host: Sequence[Tensor], copies: Sequence[Tensor], buffer: int) -> None:
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            for source, copy in zip(host, copies, strict=True):
                copy.copy_(source, non_blocking=True)
            self._filled[buffer].record()


def make_ring(device: torch.device, depth: int, buffer_nbytes: int) -> Ring:
    """The ring for a device."""
    kind = CudaRing if device.type == "cuda" else Ring
    return kind(device, depth, buffer_nbytes)

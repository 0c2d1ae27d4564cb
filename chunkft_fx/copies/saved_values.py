"""Saved values on their way to host memory and back: what offload, release, fetch and wait do with them.

On CUDA all copies, out and in, run on one stream of their own. Its order is what makes host memory safe to reuse: a
copy out that takes over the memory of an earlier value comes behind every copy that reads or writes that value, and a
value comes in behind its own way out. One stream for both directions costs nothing: offloads belong to forward,
fetches to backward. On the CPU the copies are plain ones.

Device memory belongs to the compute stream alone. A value is held (by the slot that its release names) until the
compute stream waits for the end of its copy, a fetched copy is held here until the compute stream waits for it; what
either frees is then free in the order of that stream. `record_stream` would be simpler, but lets the allocator hand
out the memory only when a GPU event happens to be found complete, at no point that a memory model can name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chunkft_fx.copies.host_memory import HostMemory
from chunkft_fx.graph.layout import run_strides

# Host buffers come in sizes of 8, 9, ... 15 times a power of two: 12.5% waste at most, and batches whose length varies
# a little share them.
SIZES_PER_DOUBLING = 8
SMALLEST_BUFFER = 2048


class HostPool:
    """Buffers of host memory that are used again: as many as were ever in use at once, while sizes stay the same."""

    def __init__(self, memory: HostMemory, pinned: bool) -> None:
        self.nbytes = 0  # of all buffers, taken or free
        self._memory = memory
        self._pinned = pinned
        self._free: list[Tensor] = []

    @property
    def free_nbytes(self) -> int:
        """Bytes of the buffers that nobody uses."""
        return sum(b.numel() for b in self._free)

    def take(self, nbytes: int) -> Tensor:
        """The smallest free buffer of at least ``nbytes``, else a new one: ``uint8``."""
        fitting = [i for i, b in enumerate(self._free) if b.numel() >= nbytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda i: self._free[i].numel()))
        size = buffer_nbytes(nbytes)
        self.nbytes += size
        return self._memory.zeros((size,), torch.uint8, self._pinned)

    def give_back(self, buffer: Tensor) -> None:
        """Let others use a buffer."""
        self._free.append(buffer)


def buffer_nbytes(nbytes: int) -> int:
    """The bytes of the buffer that holds ``nbytes``."""
    wanted = max(nbytes, SMALLEST_BUFFER)
    unit: int = 2 ** ((wanted - 1).bit_length()) // (2 * SIZES_PER_DOUBLING)
    return -(-wanted // unit) * unit


class HostCopy:
    """A value in host memory; its buffer goes back to the pool when nobody holds the copy any more.

    So a step that ends early, by an exception or because nobody calls backward, leaves nothing behind.
    """

    def __init__(self, like: Tensor, pool: HostPool) -> None:
        self._pool = pool
        self._buffer = pool.take(like.nbytes)
        run = self._buffer[: like.nbytes].view(like.dtype)
        self.tensor = run.as_strided(like.shape, run_strides(like.shape, like.stride()))

    def __del__(self) -> None:
        if hasattr(self, "_buffer"):  # not when taking it failed
            self._pool.give_back(self._buffer)


class SavedCopies:
    """Carries saved values between a device and host memory; ``number`` tells the copies of one program apart."""

    def __init__(self, device: torch.device, memory: HostMemory) -> None:
        self.device = device
        self.pool = HostPool(memory, pinned=device.type == "cuda")

    def offload(self, values: Sequence[Tensor], number: int) -> list[HostCopy]:
        """Begin to copy values to host memory; they must stay as they are until ``release``."""
        copies = [HostCopy(value, self.pool) for value in values]
        self._out(values, [c.tensor for c in copies], number)
        return copies

    def release(self, number: int) -> None:
        """Let the memory of offloaded values be used again by work that follows on the current stream."""

    def fetch(self, host: Sequence[HostCopy], number: int) -> list[Tensor]:
        """Begin to bring values back, into new tensors; the host copies can be dropped at once."""
        sources = [h.tensor for h in host]
        copies = [torch.empty_strided(s.shape, s.stride(), dtype=s.dtype, device=self.device) for s in sources]
        self._in(sources, copies, number)
        return copies

    def wait(self, number: int) -> None:
        """Let work that follows on the current stream read fetched values."""

    def abandon(self) -> None:
        """End all copies under way: the program that began them failed."""

    def _out(self, values: Sequence[Tensor], host: Sequence[Tensor], number: int) -> None:
        for value, copy in zip(values, host, strict=True):
            copy.copy_(value)

    def _in(self, host: Sequence[Tensor], copies: Sequence[Tensor], number: int) -> None:
        for source, copy in zip(host, copies, strict=True):
            copy.copy_(source)


class CudaSavedCopies(SavedCopies):
    """Copies on a stream of their own, behind the work that came before them."""

    def __init__(self, device: torch.device, memory: HostMemory) -> None:
        super().__init__(device, memory)
        self._copies = torch.cuda.Stream(device)
        self._outgoing: dict[int, torch.cuda.Event] = {}
        self._incoming: dict[int, tuple[torch.cuda.Event, Sequence[Tensor]]] = {}

    def release(self, number: int) -> None:
        # values of one offload can be released at several places; the event lasts until the next step records another
        torch.cuda.current_stream(self.device).wait_event(self._outgoing[number])

    def wait(self, number: int) -> None:
        event, _ = self._incoming.pop(number)
        torch.cuda.current_stream(self.device).wait_event(event)

    def abandon(self) -> None:
        if self._incoming or self._outgoing:
            # whoever gets the memory of these values next comes behind the copies
            torch.cuda.current_stream(self.device).wait_stream(self._copies)
        self._incoming.clear()
        self._outgoing.clear()

    def _out(self, values: Sequence[Tensor], host: Sequence[Tensor], number: int) -> None:
        self._outgoing[number] = self._copy(values, host)

    def _in(self, host: Sequence[Tensor], copies: Sequence[Tensor], number: int) -> None:
        self._incoming[number] = self._copy(host, copies), copies

    def _copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> torch.cuda.Event:
        # the work before makes the values that go out, and may still use the memory that new tensors were given
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
            return self._copies.record_event()


def make_saved_copies(device: torch.device, memory: HostMemory) -> SavedCopies:
    """The carrier for a device."""
    kind = CudaSavedCopies if device.type == "cuda" else SavedCopies
    return kind(device, memory)

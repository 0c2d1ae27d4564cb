"""Saved values: copies what forward leaves for backward to a tier, and back: offload, release, fetch and wait.

Copies out run over a link of their own, copies in over one that they share with everything else that comes to the
device (`copies.link`), on CUDA a stream each. Host memory is safe to use again because links follow each other's marks:
a copy out that takes over the memory of an earlier value comes behind the copy that read that value, and a value comes
in behind its own way out.

Device memory belongs to the compute stream alone. A value is held (by the slot that its release names) until the
compute stream waits for the end of its copy, a fetched copy is held by the link until the compute stream waits for it;
what either frees is then free in the order of that stream. `record_stream` would be simpler, but lets the allocator
hand out the memory only when a GPU event happens to be found complete, at no point that a memory model can name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chunkft_fx.copies.link import Link, Mark
from chunkft_fx.copies.tier import Tier
from chunkft_fx.graph.layout import run_strides

# Host buffers come in sizes of 8, 9, ... 15 times a power of two: 12.5% waste at most, and batches whose length varies
# a little share them.
SIZES_PER_DOUBLING = 8
SMALLEST_BUFFER = 2048


@dataclass(eq=False)
class Buffer:
    """Memory of a tier, and the mark behind the latest copy that reads it."""

    memory: Tensor
    read: Mark | None = None


class BufferPool:
    """Buffers of a tier that are used again: as many as were ever in use at once, while sizes stay the same."""

    def __init__(self, tier: Tier) -> None:
        self.nbytes = 0  # of all buffers, taken or free
        self._tier = tier
        self._free: list[Buffer] = []

    @property
    def free_nbytes(self) -> int:
        """Bytes of the buffers that nobody uses."""
        return sum(b.memory.numel() for b in self._free)

    def take(self, nbytes: int) -> Buffer:
        """The smallest free buffer of at least ``nbytes``, else a new one: ``uint8``."""
        fitting = [i for i, b in enumerate(self._free) if b.memory.numel() >= nbytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda i: self._free[i].memory.numel()))
        size = buffer_nbytes(nbytes)
        self.nbytes += size
        return Buffer(self._tier.allocate((size,), torch.uint8))

    def give_back(self, buffer: Buffer) -> None:
        """Let others use a buffer."""
        self._free.append(buffer)


def buffer_nbytes(nbytes: int) -> int:
    """The bytes of the buffer that holds ``nbytes``."""
    wanted = max(nbytes, SMALLEST_BUFFER)
    unit: int = 2 ** ((wanted - 1).bit_length()) // (2 * SIZES_PER_DOUBLING)
    return -(-wanted // unit) * unit


class KeptCopy:
    """A value in a tier; its buffer goes back to the pool when nobody holds the copy any more.

    So a step that ends early, by an exception or because nobody calls backward, leaves nothing behind.
    """

    def __init__(self, like: Tensor, pool: BufferPool) -> None:
        self._pool = pool
        self.buffer = pool.take(like.nbytes)
        self.left: Mark | None = None  # behind its way out
        run = self.buffer.memory[: like.nbytes].view(like.dtype)
        self.tensor = run.as_strided(like.shape, run_strides(like.shape, like.stride()))

    def __del__(self) -> None:
        if hasattr(self, "buffer"):  # not when taking it failed
            self._pool.give_back(self.buffer)


class SavedValues:
    """Carries saved values between a device and a tier; ``number`` tells the copies of one program apart."""

    def __init__(self, outgoing: Link, incoming: Link, tier: Tier) -> None:
        self.pool = BufferPool(tier)
        self._out, self._in, self._tier = outgoing, incoming, tier
        self._left: dict[int, Mark] = {}
        self._came: dict[int, Mark] = {}

    def offload(self, values: Sequence[Tensor], number: int) -> list[KeptCopy]:
        """Begin to copy values to the tier; they must stay as they are until ``release``."""
        copies = [KeptCopy(value, self.pool) for value in values]
        self._out.follow()  # the work before makes the values
        for copy in copies:
            if copy.buffer.read is not None:
                self._out.follow_mark(copy.buffer.read)
        self._tier.copy_out(self._out, values, [c.tensor for c in copies])
        mark = self._left[number] = self._out.mark()
        for copy in copies:
            copy.left = mark
        return copies

    def release(self, number: int) -> None:
        """Let the memory of offloaded values be used again by work that follows on the current stream."""
        # values of one offload can be released at several places; the mark lasts until the next step makes another
        self._out.wait(self._left[number])

    def fetch(self, kept: Sequence[KeptCopy], number: int) -> list[Tensor]:
        """Begin to bring values back, into new tensors; the kept copies can be dropped at once."""
        sources = [k.tensor for k in kept]
        device = self._in.device
        copies = [torch.empty_strided(s.shape, s.stride(), dtype=s.dtype, device=device) for s in sources]
        self._in.follow()  # the work before may still use the memory that the new tensors were given
        for left in {k.left for k in kept if k.left is not None}:
            self._in.follow_mark(left)
        self._tier.copy_in(self._in, sources, copies)
        mark = self._came[number] = self._in.mark(copies)
        for k in kept:
            k.buffer.read = mark
        return copies

    def wait(self, number: int) -> None:
        """Let work that follows on the current stream read fetched values."""
        self._in.wait(self._came.pop(number))

    def abandon(self) -> None:
        """End all copies under way: the program that began them failed; whoever gets their memory next comes behind."""
        self._out.abandon()
        self._in.abandon()
        self._came.clear()
        self._left.clear()

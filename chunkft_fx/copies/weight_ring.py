"""Weight ring: copies weights of the host tier into the few buffers on the device that they pass through.

All fetches run over one link (`copies.link`), on CUDA a stream of its own: a fetch begins when the work before its node
is done (which frees its buffer and finishes any update of the weights it reads), and its wait makes the compute stream
wait for it alone. On the CPU the same ring is filled by plain copies, so that a program which reused a buffer too
early would be wrong there too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chunkft_fx.copies.link import Link, Mark
from chunkft_fx.copies.tier import Tier
from chunkft_fx.graph.layout import stage_nbytes


def ring_buffer_nbytes(uses: Sequence[Sequence[Tensor]]) -> int:
    """The bytes of a buffer that holds the tensors of any one use."""
    return max((sum(stage_nbytes(t.numel() * t.element_size()) for t in use) for use in uses), default=0)


class Ring:
    """``depth`` buffers of ``buffer_nbytes`` each, taken from the device when first used."""

    def __init__(self, link: Link, tier: Tier, depth: int, buffer_nbytes: int) -> None:
        self.link = link
        self.depth = depth
        self.buffer_nbytes = buffer_nbytes
        self._tier = tier
        self._buffers: list[Tensor] = []
        self._filled: dict[int, Mark] = {}  # by buffer: behind its latest fetch

    def fetch(self, host: Sequence[Tensor], buffer: int) -> list[Tensor]:
        """Begin to copy these tensors, wherever they lie, into a buffer; the copies have their shapes and strides."""
        while len(self._buffers) < self.depth:
            self._buffers.append(torch.empty(self.buffer_nbytes, dtype=torch.uint8, device=self.link.device))
        copies: list[Tensor] = []
        offset = 0
        for source in host:
            nbytes = source.numel() * source.element_size()
            run = self._buffers[buffer][offset : offset + nbytes].view(source.dtype)
            copies.append(run.as_strided(source.shape, source.stride()))
            offset += stage_nbytes(nbytes)
        self.link.follow()
        self._tier.copy_in(self.link, host, copies)
        self._filled[buffer] = self.link.mark()
        return copies

    def wait(self, buffer: int) -> None:
        """Let work that follows on the current stream read the buffer."""
        self.link.wait(self._filled[buffer])

    def abandon(self) -> None:
        """End all fetches under way: the program that began them failed; whoever gets the buffers next comes behind."""
        self.link.abandon()
        self._filled.clear()

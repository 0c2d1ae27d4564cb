"""Ring of pieces: copies optimizer states, or gradients, piece by piece through a few buffers on the device, and back.

A step that covers all parameters fetches the states of one piece while those of another are updated and those of a
third go out. They come in over one link and go out over another (`copies.link`), so that both ways of the bus are
busy. A buffer is filled again behind the copies that empty it. Updates can run beside the backward, which would
otherwise wait for the states of a whole region before it goes on to the next. Beside a CPU host memory is where
states are updated: nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from chunkft_fx.copies.link import Link, Mark, open_link
from chunkft_fx.copies.states.batches import Batch, batches_of, carved, stage_places
from chunkft_fx.copies.tier import HostTier, Tier


class PieceRing:
    """The ring of a CPU: pieces are updated where host memory keeps them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._there: dict[int, list[Tensor]] = {}

    def fetch(self, piece: int, host: Sequence[Tensor]) -> None:
        """Begin to bring the tensors of a piece, each contiguous, into a free buffer."""
        self._there[piece] = list(host)

    def is_fetched(self, piece: int) -> bool:
        """Whether a piece has a buffer."""
        return piece in self._there

    def take(self, piece: int, host: Sequence[Tensor]) -> list[Tensor]:
        """Memory for values that are to go to these host tensors, ready for work on the current stream.

        A piece that was fetched gives its buffer, with what it holds; any other gets a free one.
        """
        self._there[piece] = list(host)
        return self._there[piece]

    def tensors(self, piece: int) -> list[Tensor]:
        """The tensors of a fetched piece, in order, ready for work on the current stream."""
        return self._there[piece]

    def write_back(self, piece: int) -> None:
        """Begin to take a piece back to where it came from, behind the work on the current stream."""
        del self._there[piece]

    def let_go(self, piece: int) -> None:
        """Free the buffer of a piece, behind the work on the current stream, as if it had never been fetched."""
        del self._there[piece]

    def follow(self) -> None:
        """Put copies in that begin from now on behind the work of the current stream, which wrote host memory."""

    @contextmanager
    def beside(self, is_behind: bool = True) -> Iterator[None]:
        """While inside, work is put beside that of the current stream, if ``is_behind`` behind what it had so far."""
        yield

    def event(self) -> torch.cuda.Event | None:
        """An event behind the work of the current stream; None on the CPU, where all of it is done."""
        return None

    def join(self) -> None:
        """Put work that follows on the current stream behind all that was put beside it."""

    def settle(self) -> None:
        """Put work that follows on the current stream behind all copies out."""

    def synchronize(self) -> None:
        """Wait until host memory is up to date with every copy begun."""

    def abandon(self) -> None:
        """Put work that follows on the current stream behind all copies under way, and free all buffers."""
        self._there.clear()


class CopyingRing(PieceRing):
    """``depth`` buffers of ``nbytes`` each on the device of two links; their memory is taken once."""

    def __init__(self, incoming: Link, outgoing: Link, tier: Tier, depth: int, nbytes: int) -> None:
        super().__init__(incoming.device)
        self._incoming, self._outgoing, self._tier = incoming, outgoing, tier
        self._buffers = torch.empty((depth, nbytes), dtype=torch.uint8, device=self.device)
        for link in (incoming, outgoing):
            link.follow()
            link.reserve(self._buffers)
        self._beside = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        with self.beside():
            # on a full device the allocator gives back pages of which all is free, and waits for their stream before
            self._hold_page = torch.empty(1, dtype=torch.uint8, device=self.device)
        self._free = list(range(depth))
        self._held: dict[int, int] = {}  # by piece, its buffer
        self._batches: dict[int, list[Batch]] = {}  # by piece
        self._came: dict[int, Mark] = {}  # by piece, behind its way in
        self._left: dict[int, Mark] = {}  # by piece, behind its latest way out
        self._emptied: dict[int, Mark] = {}  # by buffer, likewise

    def fetch(self, piece: int, host: Sequence[Tensor]) -> None:
        at = self._free.pop(0)
        self._held[piece] = at
        buffer = self._buffers[at]
        places, _ = stage_places(host)
        self._there[piece] = carved(buffer, host, places)
        self._batches[piece] = batches_of(buffer, host, places)
        for mark in (self._emptied.get(at), self._left.get(piece)):
            if mark is not None:
                self._incoming.follow_mark(mark)
        for batch in self._batches[piece]:
            self._tier.copy_in(self._incoming, batch.host, batch.staged)
        self._came[piece] = self._incoming.mark()

    def take(self, piece: int, host: Sequence[Tensor]) -> list[Tensor]:
        if piece in self._held:
            self._incoming.wait(self._came.pop(piece))
        else:
            self._held[piece] = at = self._free.pop(0)
            if at in self._emptied:
                self._outgoing.wait(self._emptied[at])
        buffer = self._buffers[self._held[piece]]
        places, _ = stage_places(host)
        self._there[piece] = carved(buffer, host, places)
        self._batches[piece] = batches_of(buffer, host, places)
        return self._there[piece]

    def tensors(self, piece: int) -> list[Tensor]:
        self._incoming.wait(self._came[piece])
        return self._there[piece]

    def write_back(self, piece: int) -> None:
        self._outgoing.follow()
        for batch in self._batches[piece]:
            self._tier.copy_out(self._outgoing, batch.staged, batch.host)
        self._left[piece] = self._empty(piece)

    def let_go(self, piece: int) -> None:
        self._outgoing.follow()
        self._empty(piece)

    def follow(self) -> None:
        self._incoming.follow()

    def _empty(self, piece: int) -> Mark:
        """Free a buffer behind the copies out begun so far, and all that these follow."""
        at = self._held.pop(piece)
        mark = self._emptied[at] = self._outgoing.mark()
        self._free.append(at)
        del self._there[piece], self._batches[piece]
        self._came.pop(piece, None)
        return mark

    @contextmanager
    def beside(self, is_behind: bool = True) -> Iterator[None]:
        if self._beside is None:
            yield
            return
        if is_behind:
            self._beside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._beside):
            yield

    def event(self) -> torch.cuda.Event | None:
        return torch.cuda.current_stream(self.device).record_event() if self._beside is not None else None

    def join(self) -> None:
        if self._beside is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._beside)

    def settle(self) -> None:
        self._outgoing.wait(self._outgoing.mark())

    def synchronize(self) -> None:
        self._incoming.synchronize()
        self._outgoing.synchronize()

    def abandon(self) -> None:
        self._incoming.abandon()
        self._outgoing.abandon()
        self._free += self._held.values()
        self._held.clear()
        self._batches.clear()
        self._came.clear()
        super().abandon()


def make_ring(incoming: Link, depth: int, nbytes: int) -> PieceRing:
    """The ring for states that host memory keeps and this link brings, with device memory where it needs any."""
    device = incoming.device
    if device.type != "cuda":
        return PieceRing(device)
    return CopyingRing(incoming, open_link(device), HostTier(device), depth, nbytes)

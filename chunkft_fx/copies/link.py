"""Link: copies tensors between the compute device and a tier, in an order that its users can rely on.

The weight ring, saved values and optimizer states all copy over links. *The current stream* is where the device
computes. This is what a link promises:

- **In turn.** The copies of one link are done one after another, in the order in which they were begun. Between two
  links nothing is ordered, except by ``follow`` and ``follow_mark``.
- **Behind the work before.** A copy is done behind all work that the current stream, and behind all copies that the
  links named in ``follow``, had when ``follow`` was called before it. So the source is complete, and nothing uses the
  memory of the target any more. Later work is not held up by a copy.
- **Waited for.** Work that is put on the current stream after ``wait(mark)`` is done behind every copy that was begun
  before the mark was made. It does not wait for copies that were begun after the mark. A mark can be waited for any
  number of times. Without a wait nothing is promised about when a copy is done.
- **Held.** A link holds the tensors given to ``mark`` until that mark is waited for, or the link is abandoned. The
  allocator hands out freed memory in the order of the current stream: memory that is held for so long is not handed out
  while a copy into it is under way.
- **Abandoned.** After ``abandon``, work that is put on the current stream is done behind every copy that was begun, and
  the link holds nothing. A step that fails calls it before the step's values are dropped. The link can be used again
  at once; marks made before it hold nothing, but can still be waited for.
- **Synchronized.** ``synchronize`` returns when every copy that was begun is done: the CPU may then use host memory.

In return, whoever begins a copy leaves its source as it is, and puts no work on the current stream that uses its
target, until a wait behind that copy; and lets no other link use the target unless that link follows.

The CPU's link does each copy as it is begun, the earliest moment that a CUDA link may do it. A program that overwrites
a buffer too early is therefore wrong there, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Mark:
    """A point in the order of a link's copies, the event that tells when it is reached, and what is held until then."""

    held: Sequence[Tensor] = ()
    event: torch.cuda.Event | None = None  # None on the CPU, where each mark is reached when it is made


class Link:
    """The link of the CPU: each copy is done when it is begun."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._holding: set[Mark] = set()

    def follow(self, *others: Link) -> None:
        """Put copies begun from now on behind the work of the current stream, and the copies of these links, so far."""

    def follow_mark(self, mark: Mark) -> None:
        """Put copies begun from now on behind the copies that another link began before this mark."""

    def copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Begin to copy each source into its target, of the same shape, whatever its strides."""
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    def mark(self, holding: Sequence[Tensor] = ()) -> Mark:
        """A mark behind the copies begun so far; these tensors are held until it is waited for."""
        mark = Mark(tuple(holding))
        if holding:
            self._holding.add(mark)
        return mark

    def wait(self, mark: Mark) -> None:
        """Let work that follows on the current stream use what was copied before a mark of this link."""
        mark.held = ()
        self._holding.discard(mark)

    def abandon(self) -> None:
        """Put what follows on the current stream behind all copies begun, and hold nothing: a step failed."""
        for mark in self._holding:
            mark.held = ()
        self._holding.clear()

    def synchronize(self) -> None:
        """Return when all copies begun are done."""

    def reserve(self, memory: Tensor) -> None:
        """Have device memory that is freed handed out only behind this link's copies and the current stream so far."""


class CudaLink(Link):
    """A CUDA stream of its own for copies; an event for each mark."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)

    def follow(self, *others: Link) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        for other in others:
            if isinstance(other, CudaLink):
                self._stream.wait_stream(other._stream)

    def follow_mark(self, mark: Mark) -> None:
        if mark.event is not None:
            self._stream.wait_event(mark.event)

    def copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        with torch.cuda.stream(self._stream):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)

    def mark(self, holding: Sequence[Tensor] = ()) -> Mark:
        mark = super().mark(holding)
        mark.event = torch.cuda.Event()
        mark.event.record(self._stream)
        return mark

    def wait(self, mark: Mark) -> None:
        if mark.event is not None:
            torch.cuda.current_stream(self.device).wait_event(mark.event)
        super().wait(mark)

    def abandon(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        super().abandon()

    def synchronize(self) -> None:
        self._stream.synchronize()

    def reserve(self, memory: Tensor) -> None:
        memory.record_stream(self._stream)
        memory.record_stream(torch.cuda.current_stream(self.device))


def open_link(device: torch.device) -> Link:
    """A new link between a device and the tiers beside it."""
    return CudaLink(device) if device.type == "cuda" else Link(device)

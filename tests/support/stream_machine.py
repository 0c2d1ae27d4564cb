"""CUDA streams without a GPU, for tests of what runs on them: their work happens as late, or early, as it may."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from chunkft_fx.copies.link import CudaLink
from chunkft_fx.copies.states.stage import CopiedStage
from chunkft_fx.copies.tier import HostTier

CPU = torch.device("cpu")


class Machine:
    """Streams whose work is done when something waits for it, or at a moment that ``chance`` picks.

    The compute stream is the Python program itself, and what `compute_late` puts there. What a stream may do early or
    late is bounded only by the waits that were asked for, so that a wait that is missing shows as a wrong value.
    """

    def __init__(self) -> None:
        self.work: list[Work] = []
        self.current: Stream | None = None
        self.chance: random.Random | None = None
        self.compute = Stream(self, computes=True)

    def queue(self, stream: Stream, action: Callable[[], object] | None, after: Work | None = None) -> None:
        stream.queued += action is not None
        work = Work(action, [w for w in (stream.last, after) if w is not None])
        stream.last = work
        self.work.append(work)
        self.drift()

    def compute_late(self, action: Callable[[], object]) -> None:
        """Put work on the compute stream that is done only when something comes behind it."""
        self.queue(self.compute, action)

    def drift(self) -> None:
        """Let some of the waiting work happen now."""
        waiting = [w for w in self.work if not w.done]
        if self.chance is not None and waiting and self.chance.random() < 0.5:
            self.finish(self.chance.choice(waiting))

    def finish(self, last: Work | None) -> None:
        """Do this work and all that it comes after, nothing else."""
        needed: set[Work] = set()
        pending = [] if last is None else [last]
        while pending:
            work = pending.pop()
            if not work.done and work not in needed:
                needed.add(work)
                pending += work.after
        for work in [w for w in self.work if w in needed]:  # as queued, which no dependency contradicts
            if work.action is not None:
                work.action()
            work.done, work.action = True, None  # lets go of its tensors
        self.work = [w for w in self.work if not w.done]


class Work:
    def __init__(self, action: Callable[[], object] | None, after: list[Work]) -> None:
        self.action = action
        self.after = after
        self.done = False


class Stream:
    """A copy stream of the machine, or the compute stream."""

    def __init__(self, machine: Machine, computes: bool = False) -> None:
        self.machine = machine
        self.computes = computes
        self.last: Work | None = None
        self.waits: list[tuple[Stream, int]] = []  # for which stream, and how much was queued on this one by then
        self.queued = 0

    def wait_stream(self, other: Stream) -> None:
        self.waits.append((other, self.queued))
        self._wait(other.last)

    def wait_event(self, event: Event) -> None:
        self._wait(event.last)

    def synchronize(self) -> None:
        self.machine.finish(self.last)

    def _wait(self, last: Work | None) -> None:
        if self.computes:
            self.machine.finish(last)
        else:
            self.machine.queue(self, None, last)


class Event:
    def __init__(self) -> None:
        self.last: Work | None = None

    def record(self, stream: Stream) -> None:
        self.last = stream.last


def copied_stage(capacity: int) -> CopiedStage:
    """A stage whose links are streams of the machine."""
    return CopiedStage(CudaLink(CPU), CudaLink(CPU), HostTier(CPU), capacity)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """CUDA streams on the CPU."""
    machine = Machine()
    copy = Tensor.copy_

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        machine.current = stream
        yield
        machine.current = None

    def copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if machine.current is None:
            return copy(target, source)
        assert non_blocking
        machine.queue(machine.current, lambda: copy(target, source))
        return target

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(machine))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: machine.compute)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(Tensor, "copy_", copied)
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    return machine

"""Runs updates of an optimizer's step on into the next forward, in which each region waits for those of its own.

The updates are put on a stream beside the current one, in the order in which the forward will ask for them: a few at
the step, the others a few ahead of the region that is run, because a GPU's queues take only so much work, and who fills
them waits. Until the forward has asked for all, nobody can see an old weight: parameters are guarded between the step
and the next call, and what the call has left over is done at its end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from chunkft_fx.runtime.guarded_parameter import guard, unguard

# Updates that are put ahead of the one that is waited for. Each is a dozen copies and events, of a thousand that a
# stream of a GPU has room for; they keep a link busy for a tenth of a second.
AHEAD = 16
# Puts the update of that number on a stream beside the current one; returns an event behind it, None on the CPU.
Put = Callable[[int], torch.cuda.Event | None]


class LateUpdates:
    """The updates of one model that may still be to come."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._device = torch.device("cpu")
        self._put: Put | None = None
        self._abandon: Callable[[], None] | None = None
        self._count = 0  # updates in all
        self._last: dict[str, int] = {}  # by parameter, how many updates come up to its last one
        self._events: list[torch.cuda.Event | None] = []  # of those that were put
        self._awaited = 0  # so many of them the current stream waits for
        self._guarded: list[nn.Parameter] = []
        self._is_called = False

    @property
    def is_under_way(self) -> bool:
        """Whether there are updates that the current stream may not wait for yet."""
        return bool(self._count)

    def begin(
        self,
        device: torch.device,
        names: Sequence[Iterable[str]],
        put: Put,
        abandon: Callable[[], None],
        parameters: Iterable[nn.Parameter],
    ) -> None:
        """Begin updates of these parameters, one after another, and guard ``parameters`` until they are waited for.

        ``abandon`` is called if one fails; those behind it are not put any more.
        """
        self._device, self._count, self._abandon = device, len(names), abandon
        self._last = {name: i + 1 for i, own in enumerate(names) for name in own}
        self._put = put
        self._put_up_to(AHEAD)
        self._guarded = list(parameters)
        guard(self._guarded, self.synchronize)

    def wait(self, names: Iterable[str]) -> None:
        """Put work that follows on the current stream behind the updates of these parameters."""
        with self._lock:
            count = max((self._last.get(name, 0) for name in names), default=0)
            if count:
                self._put_up_to(count + AHEAD)
            if count > self._awaited:
                self._follow(self._events[count - 1])
                self._awaited = count

    @contextmanager
    def during_call(self) -> Iterator[None]:
        """A call of the model, which waits for what it reads; behind it everything is waited for."""
        is_outermost = not self._is_called
        try:
            self._is_called = True
            self._unguard()
            yield
        finally:
            if is_outermost:
                self._is_called = False
                self.finish()

    def finish(self) -> None:
        """Put work that follows on the current stream behind all updates.

        Within a call, that of another thread perhaps, it returns when they are done: the call may run on other streams.
        """
        with self._lock:
            self._put_up_to(self._count)
            last = self._events[-1] if self._events else None
            if last is not None and self._is_called:
                last.synchronize()
            self._follow(last)
            self._unguard()
            self._drop()

    def synchronize(self) -> None:
        """Return when all updates are done: then every stream, and every thread, sees them.

        Until then parameters stay guarded, so that a thread which reads one meanwhile comes here, too.
        """
        with self._lock:
            self._put_up_to(self._count)
            last = self._events[-1] if self._events else None
            if last is not None:
                last.synchronize()
            self._unguard()

    def _put_up_to(self, count: int) -> None:
        with self._lock:
            try:
                while self._put is not None and len(self._events) < min(count, self._count):
                    self._events.append(self._put(len(self._events)))
            except BaseException:
                if self._abandon is not None:
                    self._abandon()
                self._unguard()
                self._drop()
                raise

    def _drop(self) -> None:
        self._put, self._abandon, self._count, self._last, self._events, self._awaited = None, None, 0, {}, [], 0

    def _unguard(self) -> None:
        unguard(self._guarded)
        self._guarded = []

    def _follow(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            event.wait(torch.cuda.current_stream(self._device))

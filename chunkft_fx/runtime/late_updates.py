"""Runs updates of an optimizer's step on into the next forward, in which each region waits for those of its own.

The step has put them on a stream beside the current one, in the order in which the forward will ask for them. Until the
forward has asked for all, nobody can see an old weight: parameters are guarded between the step and the next call, and
what the call has left over is waited for at its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from chunkft_fx.runtime.guarded_parameter import guard, unguard


class LateUpdates:
    """The updates of one model that may still run. A CPU has none: it does one thing after another."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []  # one behind each update
        self._last: dict[str, int] = {}  # by parameter, how many updates come up to its last one
        self._awaited = 0  # so many of them the current stream waits for
        self._guarded: list[nn.Parameter] = []
        self._calls = 0

    @property
    def is_under_way(self) -> bool:
        """Whether there are updates that the current stream may not wait for yet."""
        return bool(self._events)

    def put(self, names: Iterable[str]) -> None:
        """Note that the current stream was given an update of these parameters."""
        event = torch.cuda.Event()
        event.record()
        self._events.append(event)
        self._last.update(dict.fromkeys(names, len(self._events)))

    def guard(self, parameters: Iterable[nn.Parameter]) -> None:
        """End the step: from now on whoever reads one of these parameters waits first."""
        self._guarded = list(parameters)
        guard(self._guarded, self.synchronize)

    def wait(self, names: Iterable[str]) -> None:
        """Put work that follows on the current stream behind the updates of these parameters."""
        count = max((self._last.get(name, 0) for name in names), default=0)
        if count > self._awaited:
            self._events[count - 1].wait()
            self._awaited = count

    @contextmanager
    def during_call(self) -> Iterator[None]:
        """A call of the model, which waits for what it reads; behind it everything is waited for."""
        self._unguard()
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self.finish()

    def finish(self) -> None:
        """Put work that follows on the current stream behind all updates."""
        self._unguard()
        if self._events:
            self._events[-1].wait()
        self._events, self._last, self._awaited = [], {}, 0

    def synchronize(self) -> None:
        """Return when all updates are done: then every stream, and every thread, sees them."""
        if self._events:
            self._events[-1].synchronize()
        self._unguard()

    def _unguard(self) -> None:
        guarded, self._guarded = self._guarded, []
        unguard(guarded)

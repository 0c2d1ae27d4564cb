"""Runs Python's garbage collector less often while graphs are made.

A trace and the graphs that come of it are millions of small objects that all stay alive. The collector, which begins
whenever some hundreds were made, finds nothing among them and takes a sixth of the first step.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

# Objects made before the youngest generation is looked at, then how often each until the next older one is.
SELDOM = (200_000, 20, 100)


class Collector:
    """The thresholds of the process's collector, raised while anyone asks for it; larger ones of the user's stay."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._askers = 0
        self._before = self._raised = gc.get_threshold()

    @contextlib.contextmanager
    def seldom(self) -> Iterator[None]:
        """While inside, the collector begins less often; where the user turned it off it stays off."""
        with self._lock:
            self._askers += 1
            if self._askers == 1:
                self._before = gc.get_threshold()
                self._raised = _larger(self._before)
                gc.set_threshold(*self._raised)
        try:
            yield
        finally:
            with self._lock:
                self._askers -= 1
                if not self._askers and gc.get_threshold() == self._raised:  # nobody else changed them meanwhile
                    gc.set_threshold(*self._before)


def _larger(thresholds: tuple[int, int, int]) -> tuple[int, int, int]:
    """The larger of each; a first threshold of 0 means that nothing is collected."""
    if thresholds[0] == 0:
        return thresholds
    first, second, third = (max(a, b) for a, b in zip(thresholds, SELDOM, strict=True))
    return first, second, third


COLLECTOR = Collector()

"""Decides when a program that gets SIGINT, SIGTERM or SIGHUP ends: its exit code is 128 + signal.

While a model trains, the first signal is noted and looked at between two steps, where there is something whole to save.
At any other time it ends the program in an orderly way. A second one always ends it at once, as the system does.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """The program was told to stop, and did: no error, and nothing that ``except Exception`` may swallow."""

    def __init__(self, number: int, result: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {result}")
        self.number = number


@contextmanager
def at_once() -> Iterator[None]:
    """Raise `Stopped` where the program is, when a signal comes."""

    def stop(number: int, frame: FrameType | None) -> None:
        _default()
        raise Stopped(number, "before there was anything to save")

    with _handled(stop):
        yield


@contextmanager
def between_steps() -> Iterator[Callable[[], int | None]]:
    """Note the first signal; the function that is given back returns it, or None before it came."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        _default()
        # not print: the signal may have come in the middle of one
        line = f"{signal.Signals(number).name}: finishing this step, then saving; a second signal ends at once\n"
        os.write(2, line.encode())

    with _handled(note):
        yield lambda: noted[0] if noted else None


def _default() -> None:
    """Leave the next signal to the system, which ends the program at once, whatever Python is doing."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals, except those that the program was started to ignore (by ``nohup`` or ``&``)."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only
        return
    before = {n: signal.getsignal(n) for n in SIGNALS}
    taken = {n: h for n, h in before.items() if h is not signal.SIG_IGN and h is not None}
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in taken.items():
            signal.signal(number, old)

"""Checks that ranks are about to do the same before they do it together, so that none waits for one that does not.

Ranks meet in the key-value store that `torch.distributed` was set up with. Unlike a collective, waiting there can be
given up: a rank that failed says so, one that was killed falls silent, and those who wait learn which one it was.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from chunkft_fx.errors import RankFailed


class Store(Protocol):
    """What meetings need of torch's stores; each call raises `RuntimeError` where the store cannot be reached."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...

    def delete_key(self, key: str, /) -> bool: ...


# A rank tells that it lives this often, and is given up after this long without a word. Seconds.
BEAT_S = 2.0
SILENT_S = 40.0
# Who waits looks into the store again after a pause that doubles up to the longer of these. Seconds.
PAUSES_S = (2e-5, 0.02)
# How often who waits looks for failures. Seconds.
LOOK_S = 1.0
# How long a broken connection waits for the rank that broke it to say why, or to miss its beats. Seconds.
MOURN_S = 4 * BEAT_S
AGAIN = "all ranks have to be started again"


class Meeting:
    """The meetings of ``size`` ranks, of which this is the one of number ``rank``, in a store of their own."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self.rank, self.size = store, rank, size
        self._reached = [0]  # the number of the latest meeting
        self._has_failed = [False]
        self._heard: dict[int, tuple[bytes, float]] = {}  # by rank: its latest beat, and when it was first seen
        self._ended = threading.Event()
        weakref.finalize(self, _end, store, rank, self._ended, self._reached, self._has_failed)
        threading.Thread(target=_beat, args=(store, rank, self._ended), daemon=True).start()

    def compare(self, word: str) -> list[str]:
        """What each rank brings to this meeting, by rank; returns once all are there.

        Raises `RankFailed` for a rank that failed on its way here, or was killed.
        """
        self._reached[0] += 1
        count = self._reached[0]
        with self._named():
            if self._has_failed[0]:  # and its user went on, as after a batch that was refused
                self._store.delete_key(_key("failed", 0, self.rank))
                self._has_failed[0] = False
            self._store.set(_key("word", count, self.rank), word)
        keys = [_key("word", count, rank) for rank in range(self.size)]
        self._await(lambda: self._is_there(keys), count)
        with self._named():
            found = [self._store.get(key).decode() for key in keys]
            if count > 2:  # all have come to the meeting before this one, so nobody still reads that before it
                self._store.delete_key(_key("word", count - 2, self.rank))
        return found

    @contextmanager
    def failing(self) -> Iterator[None]:
        """While inside, an error of this rank is told to those who wait for it."""
        try:
            yield
        except BaseException as error:
            self._has_failed[0] = True
            # who learned of another's failure passes it on: that one is what everybody has to know
            message = str(error) if isinstance(error, RankFailed) else f"{type(error).__name__}: {error}"
            _tell(self._store, self.rank, self._reached[0], message)
            raise

    @contextmanager
    def together(self) -> Iterator[None]:
        """While inside, a connection that breaks is named by the rank that broke it."""
        try:
            yield
        except RuntimeError as error:
            raise self._broken(error) from error

    def until(self, is_done: Callable[[], bool]) -> None:
        """Return when something is done that the others do as well, behind the latest meeting; raises as `compare`."""
        self._await(is_done, self._reached[0] + 1)

    def _await(self, is_done: Callable[[], bool], count: int) -> None:
        pause, looked = PAUSES_S[0], time.monotonic()
        while not is_done():
            if time.monotonic() - looked > LOOK_S:
                self._refuse_failed(count)
                looked = time.monotonic()
            time.sleep(pause)
            pause = min(2 * pause, PAUSES_S[1])

    def _is_there(self, keys: list[str]) -> bool:
        with self._named():
            return self._store.check(keys)

    def _refuse_failed(self, count: int) -> None:
        """Raise `RankFailed` for a rank that failed before it came to this meeting, or that has fallen silent."""
        failed = self._failed(count)
        if failed:
            raise RankFailed(f"{_listed(failed)}; {AGAIN}")
        silent = [rank for rank in range(self.size) if self._silence_s(rank) > SILENT_S]
        if silent:
            named = ", ".join(f"rank {rank}" for rank in silent)
            raise RankFailed(f"{named} has given no sign of life for {SILENT_S:.0f} s; {AGAIN}")

    def _failed(self, count: int) -> dict[int, str]:
        """What the ranks said that failed before the meeting of this number, by rank."""
        found = {}
        with self._named():
            for rank in range(self.size):
                key = _key("failed", 0, rank)
                if rank == self.rank or not self._store.check([key]):
                    continue
                at, message = self._store.get(key).decode().split(" ", 1)
                if int(at) < count:
                    found[rank] = message
        return found

    def _silence_s(self, rank: int) -> float:
        """Seconds since a rank's beat was last seen to change."""
        now, key = time.monotonic(), _key("beat", 0, rank)
        with self._named():
            beat = self._store.get(key) if self._store.check([key]) else b""
        if rank not in self._heard or self._heard[rank][0] != beat:
            self._heard[rank] = beat, now
        return now - self._heard[rank][1]

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankFailed(
                f"the store of torch.distributed cannot be reached ({error}): the process that keeps it, rank 0 or the "
                f"launcher, has ended; {AGAIN}"
            ) from error

    def _broken(self, error: BaseException) -> RankFailed:
        """Say which rank ended while others talked to it."""
        for rank in range(self.size):
            self._silence_s(rank)
        end = time.monotonic() + MOURN_S
        try:
            while time.monotonic() < end:
                failed = self._failed(self._reached[0] + 1)
                if failed:
                    return RankFailed(f"{_listed(failed)}; {AGAIN}")
                time.sleep(BEAT_S / 4)
            quiet = [r for r in range(self.size) if r != self.rank and self._silence_s(r) > MOURN_S - BEAT_S / 2]
        except RankFailed as lost:
            return lost
        named = ", ".join(f"rank {rank}" for rank in quiet) or "one of the ranks"
        return RankFailed(f"{named} ended while others waited for it ({error}); {AGAIN}")


def _beat(store: Store, rank: int, ended: threading.Event) -> None:
    """Tell the others that this process lives, until it does not."""
    beats = 0
    while True:
        try:
            store.set(_key("beat", 0, rank), str(beats))
        except RuntimeError:
            return
        beats += 1
        if ended.wait(BEAT_S):
            return


def _tell(store: Store, rank: int, reached: int, message: str) -> None:
    """Say that this rank failed behind the meeting of that number."""
    try:
        store.set(_key("failed", 0, rank), f"{reached} {message}")
    except RuntimeError:
        return  # the store is gone with the process that keeps it, which the others notice as well


def _end(store: Store, rank: int, ended: threading.Event, reached: list[int], has_failed: list[bool]) -> None:
    """The model, or the process, is gone."""
    ended.set()
    if not has_failed[0]:  # else others know more than that
        _tell(store, rank, reached[0], "it has let the model go, or its process has ended")


def _key(kind: str, count: int, rank: int) -> str:
    return f"{kind}/{count}/{rank}"


def _listed(failed: dict[int, str]) -> str:
    return "; ".join(f"rank {rank} failed ({message})" for rank, message in failed.items())

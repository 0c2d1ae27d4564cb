"""Writes a checkpoint, also beside training: what a step is about to change is copied or written before.

States of inactive chunks stay as they are until their turn, so most of them are written from where they are kept.
Before those of some slices change, what is not written of them yet is copied, as far as there may be copies, and the
step waits until the rest is written.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from chunkft_fx.checkpoints.disk.folders import Target
from chunkft_fx.checkpoints.disk.places import os_failure
from chunkft_fx.checkpoints.disk.sums import HEADER, Sum
from chunkft_fx.checkpoints.disk.tensor_file import Layout
from chunkft_fx.checkpoints.states import SHARD_NBYTES, Block
from chunkft_fx.copies.host_memory import available_nbytes
from chunkft_fx.plan.chunk import Slice
from chunkft_fx.ranks.ranks import Ranks

# Bytes of copies that there may be at once; those that one step asks for may be more.
COPIES_NBYTES = SHARD_NBYTES

_lock = threading.Lock()
_under_way: list[Saving] = []  # those that nobody has waited for yet, or whose error nobody has seen


class Saving:
    """One checkpoint on its way to its ``target``.

    ``blocks`` are those of all ``files`` of states. ``others`` writes everything else behind them into the folder that
    it is given, with their sums. Each of several ``ranks`` writes its blocks into the same files, rank 0 all the rest.
    """

    def __init__(
        self,
        target: Target,
        files: Sequence[tuple[str, Layout]],
        blocks: Sequence[Block],
        others: Callable[[Path, dict[str, list[Sum]]], None],
        ranks: Ranks | None = None,
    ) -> None:
        self._target, self._files, self._others = target, files, others
        self._ranks = ranks or Ranks()
        self._left = OrderedDict.fromkeys(blocks)  # to be written, or just being written
        self._of: dict[str, list[Block]] = {}
        for block in blocks:
            self._of.setdefault(block.name, []).append(block)
        self._busy: Block | None = None
        self._copied_nbytes = 0
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Write it now; what fails is raised, and nothing of the checkpoint is left."""
        self._write()
        self.raise_failure()

    def start(self) -> None:
        """Write it beside what follows; the process does not end before."""
        with _lock:
            _under_way.append(self)
        self._thread = threading.Thread(target=self._write, name=f"save {self._target.place.name}")
        self._thread.start()

    def finish(self) -> None:
        """Return when it is written, or has failed."""
        if self._thread is not None:
            self._thread.join()
        if self._failure is None:
            self._forget()

    def raise_failure(self) -> None:
        """Raise what it failed with, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            self._forget()
            raise failure

    def before_step(self) -> None:
        """Raise what it failed with, before a step changes anything."""
        self.raise_failure()

    def before_change(self, slices: Sequence[Slice]) -> None:
        """Return when the states of these slices may change in host memory."""
        with self._changed:
            touched = dict.fromkeys(b for s in slices for b in self._of.get(s.name, ()) if b.is_of(s))
            unsafe = [b for b in touched if b in self._left and not b.is_copy]
            if not unsafe:
                return
            limit = min(max(COPIES_NBYTES, sum(b.held_nbytes for b in unsafe)), available_nbytes() // 2)
            for block in reversed(unsafe):
                if block is not self._busy and self._copied_nbytes + block.held_nbytes <= limit:
                    self._copied_nbytes += block.held_nbytes
                    block.copy()
                else:
                    self._left.move_to_end(block, last=False)
            self._changed.wait_for(lambda: not any(b in self._left and not b.is_copy for b in unsafe))

    def _forget(self) -> None:
        with _lock:
            if self in _under_way:
                _under_way.remove(self)

    def _write(self) -> None:
        try:
            sums = self._write_states()
            if self._ranks.rank == 0:
                self._others(self._target.new, sums)
                self._target.complete()
            self._ranks.compare("a checkpoint that is complete", "")
        except BaseException as error:
            if self._ranks.rank == 0:
                self._target.abandon()  # before it is asked how much space there is
            known = os_failure(self._target.place, error)
            if known is not None:
                known.__cause__ = error
            self._failure = known or error
        finally:
            with self._changed:
                self._left.clear()
                self._of.clear()
                self._changed.notify_all()

    def _write_states(self) -> dict[str, list[Sum]]:
        """Write all blocks, those first that a step waits for; gives the sums by file."""
        found: dict[str, list[Sum]] = {}
        opened: list[int] = []
        try:
            for file, lies in self._files:
                opened.append(os.open(self._target.new / file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))
                found[file] = []
                if self._ranks.rank == 0:
                    os.truncate(opened[-1], lies.nbytes)
                    _write_at(opened[-1], memoryview(lies.head), 0)
                    found[file].append(Sum(HEADER, 0, len(lies.head), zlib.crc32(lies.head)))
            while (block := self._next()) is not None:
                data = block.data()
                _write_at(opened[block.file], data, block.start)
                found[self._files[block.file][0]].append(Sum(block.key, block.start, len(data), zlib.crc32(data)))
                self._is_written(block)
        finally:
            for descriptor in opened:
                os.close(descriptor)
        return self._of_all_ranks(found)

    def _of_all_ranks(self, own: dict[str, list[Sum]]) -> dict[str, list[Sum]]:
        """The sums of what each rank has written."""
        found: dict[str, list[Sum]] = {file: [] for file in own}
        for word in self._ranks.compare("states of a checkpoint", json.dumps(own)):
            for file, sums in json.loads(word).items():
                found[file] += [Sum(*s) for s in sums]
        return found

    def _next(self) -> Block | None:
        with self._changed:
            self._busy = next(iter(self._left), None)
            return self._busy

    def _is_written(self, block: Block) -> None:
        with self._changed:
            del self._left[block]
            self._busy = None
            if block.is_copy:
                self._copied_nbytes -= block.held_nbytes
            block.drop()
            self._changed.notify_all()


def _write_at(descriptor: int, data: memoryview, start: int) -> None:
    while len(data):
        done = os.pwrite(descriptor, data, start)
        data, start = data[done:], start + done


def wait_for_saves() -> None:
    """Return when every checkpoint of this process that is being saved is on the disk; raises what one failed with."""
    for saving in [*_under_way]:
        saving.finish()
        saving.raise_failure()


@atexit.register
def _tell() -> None:
    """Say what failed and was never raised, as there was no step and no save behind it."""
    for saving in _under_way:
        if saving._failure is not None:
            sys.stderr.write(f"{type(saving._failure).__name__}: {saving._failure}\n")

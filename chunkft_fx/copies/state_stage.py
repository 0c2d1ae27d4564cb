"""Optimizer state between host and device: the stage where updates happen.

Host tensors keep the cut dimension in front, so that every slice of them is one contiguous run. A *stage* holds
the states of the active slices where the model runs. On the CPU host memory is that place: nothing is copied and
updates happen in place. On CUDA the states of one chunk go out on one copy stream while those of the next come in
on another, both hidden behind the next forward and backward. There is device memory for one chunk only: what comes
in follows what goes out, 64 MiB behind it, and begins as the ``admit`` nodes of programs let it
(`passes.schedule_states`). A stage of its own memory serves states that no host memory keeps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from chunkft_fx.graph.layout import stage_nbytes

# Bytes after which the other direction may follow: 1.3 ms of copying, so that neither waits long for the first.
BATCH_NBYTES = 64 * 2**20


class Stage:
    """Where updates happen; this one is host memory itself, for weights on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._host: list[Tensor] = []

    def announce(self, host: Sequence[Tensor]) -> None:
        """Say that these contiguous host tensors are next, in place of those staged before, which are forgotten.

        Their copies begin as ``admit`` lets them, at the latest when ``tensors`` is called.
        """
        self._host = list(host)

    def admit(self, share: float, after: Sequence[torch.cuda.Stream] = ()) -> None:
        """Let copies begin until this share (0 to 1) of all that was announced is under way or there.

        They run behind the work that the current stream and those in ``after`` have by now.
        """

    def tensors(self) -> list[Tensor]:
        """The staged tensors, in the order of ``announce``, ready for work on the current stream."""
        return self._host

    def write_back(self) -> None:
        """Begin to copy what ``tensors`` gave to the host, after the work on the current stream.

        It must not change until ``synchronize``, or until others are announced.
        """

    def synchronize(self) -> None:
        """Wait until host memory is up to date with every copy begun."""


class StageOwner(Protocol):
    """An optimizer with a stage: its options, and its states by parameter, none before the first step."""

    @property
    def state_dtype(self) -> str: ...

    @property
    def states(self) -> str: ...

    @property
    def state(self) -> Mapping[Any, Any]: ...

    @property
    def stage(self) -> Stage: ...

    def take_stage(self) -> None:
        """Take the stage's memory, for the largest chunk of the model's plan, where the model runs."""

    def drop_stage(self) -> None:
        """Give the stage's memory back, before a plan with other chunks is settled."""


class FreshStage(Stage):
    """Device memory for states that start at zero whenever they are announced, and go nowhere.

    Of what is announced only shapes and dtypes are read. ``capacity`` is as for `CudaStage`.
    """

    def __init__(self, device: torch.device, capacity: int) -> None:
        super().__init__(device)
        self._arena = torch.empty(capacity, dtype=torch.uint8, device=device)
        self._staged: list[Tensor] = []

    def announce(self, host: Sequence[Tensor]) -> None:
        places, nbytes = _places(host)
        self._staged = []
        if self._arena.numel() < nbytes:
            self._arena = torch.empty(0, dtype=torch.uint8, device=self.device)  # free before growing
            self._arena = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self._arena[:nbytes].zero_()
        self._staged = _carve(self._arena, host, places)

    def tensors(self) -> list[Tensor]:
        return self._staged


@dataclass(frozen=True)
class _Copy:
    """Bytes that are contiguous on both sides: ``uint8[nbytes]`` views, and where the host's begin."""

    staged: Tensor
    host: Tensor
    address: int


@dataclass(frozen=True)
class _Batch:
    """Copies that share one event: neighbours on the stage, in ascending order there and in host memory."""

    start: int
    end: int
    copies: tuple[_Copy, ...]


class CudaStage(Stage):
    """Device memory for the states of one chunk, filled and emptied on a copy stream each.

    ``capacity`` is the bytes of the largest chunk: memory is taken once, and again only if more is asked for.
    """

    def __init__(self, device: torch.device, capacity: int) -> None:
        super().__init__(device)
        self._capacity = capacity
        self._incoming = torch.cuda.Stream(device)
        self._outgoing = torch.cuda.Stream(device)
        self._arena = torch.empty(0, dtype=torch.uint8, device=device)
        self._staged: list[Tensor] = []
        self._batches: list[_Batch] = []  # of what is staged
        self._admitted = 0  # batches
        self._written: list[_Batch] = []  # of the latest write-back, with the event after each
        self._events: list[torch.cuda.Event] = []
        self._grow()

    def announce(self, host: Sequence[Tensor]) -> None:
        places, nbytes = _places(host)
        self._capacity = max(self._capacity, nbytes)
        self._grow()
        self._host = list(host)
        self._staged = _carve(self._arena, host, places)
        self._batches = _batches(self._arena, host, places)
        self._admitted = 0

    def admit(self, share: float, after: Sequence[torch.cuda.Stream] = ()) -> None:
        batches = self._batches[self._admitted : int(share * len(self._batches))]
        if not batches:
            return
        self._admitted += len(batches)
        # the current stream may still use what was staged
        for stream in (torch.cuda.current_stream(self.device), *after):
            self._incoming.wait_stream(stream)
        awaited = -1
        with torch.cuda.stream(self._incoming):
            for batch in batches:
                last = _last_conflict(self._written, batch)
                if last > awaited:
                    self._incoming.wait_event(self._events[last])
                    awaited = last
                for copy in batch.copies:
                    copy.staged.copy_(copy.host, non_blocking=True)

    def tensors(self) -> list[Tensor]:
        self.admit(1.0)
        compute = torch.cuda.current_stream(self.device)
        compute.wait_stream(self._incoming)
        self._arena.record_stream(compute)
        return self._staged

    def write_back(self) -> None:
        if not self._batches:
            return  # what comes in must still wait for the write-back before
        # Only the latest write-back is remembered: it and what comes in both begin at the start of the stage, so that
        # the one waits for the other's first batch, and with that, in the order of the stream, for all before.
        self._outgoing.wait_stream(torch.cuda.current_stream(self.device))
        self._written, self._events = self._batches, []
        with torch.cuda.stream(self._outgoing):
            for batch in self._written:
                for copy in batch.copies:
                    copy.host.copy_(copy.staged, non_blocking=True)
                event = torch.cuda.Event()
                event.record(self._outgoing)
                self._events.append(event)

    def synchronize(self) -> None:
        self._incoming.synchronize()
        self._outgoing.synchronize()

    def _grow(self) -> None:
        if self._arena.numel() >= self._capacity:
            return
        self.synchronize()
        self._staged, self._batches, self._written, self._events = [], [], [], []
        self._arena = torch.empty(0, dtype=torch.uint8, device=self.device)  # free before growing
        self._arena = torch.empty(self._capacity, dtype=torch.uint8, device=self.device)
        for stream in (self._incoming, self._outgoing):
            self._arena.record_stream(stream)


def _places(host: Sequence[Tensor]) -> tuple[list[int], int]:
    """Each tensor's offset on the stage, in the order of host memory, and the bytes of all."""
    places = [0] * len(host)
    end = 0
    for i in sorted(range(len(host)), key=lambda i: host[i].data_ptr()):
        places[i] = end
        end += stage_nbytes(host[i].nbytes)
    return places, end


def _carve(arena: Tensor, host: Sequence[Tensor], places: Sequence[int]) -> list[Tensor]:
    """Tensors like those of the host at their places on the stage."""
    return [arena[start : start + t.nbytes].view(t.dtype).view(t.shape) for t, start in zip(host, places, strict=True)]


def _batches(arena: Tensor, host: Sequence[Tensor], places: Sequence[int]) -> list[_Batch]:
    """The copies between host and stage: neighbours on both sides as one, cut into batches."""
    runs: list[tuple[int, int, Tensor]] = []  # where it begins on the stage, its bytes, its first tensor
    for start, t in sorted(zip(places, host, strict=True), key=lambda entry: entry[0]):
        if not t.nbytes:
            continue
        if runs:
            begin, nbytes, first = runs[-1]
            is_next = begin + nbytes == start and first.data_ptr() + nbytes == t.data_ptr()
            if is_next and first.untyped_storage().data_ptr() == t.untyped_storage().data_ptr():
                runs[-1] = (begin, nbytes + t.nbytes, first)
                continue
        runs.append((start, t.nbytes, t))
    batches: list[_Batch] = []
    copies: list[_Copy] = []
    filled = 0
    for begin, nbytes, first in runs:
        source = _bytes_from(first, nbytes)
        at = 0
        while at < nbytes:
            size = min(nbytes - at, BATCH_NBYTES - filled)
            staged = arena[begin + at : begin + at + size]
            copies.append(_Copy(staged, source[at : at + size], first.data_ptr() + at))
            at, filled = at + size, filled + size
            if filled == BATCH_NBYTES:
                batches.append(_batch(arena, copies))
                copies, filled = [], 0
    if copies:
        batches.append(_batch(arena, copies))
    return batches


def _batch(arena: Tensor, copies: Sequence[_Copy]) -> _Batch:
    base, last = arena.data_ptr(), copies[-1].staged
    return _Batch(copies[0].staged.data_ptr() - base, last.data_ptr() - base + last.nbytes, tuple(copies))


def _bytes_from(first: Tensor, nbytes: int) -> Tensor:
    """``nbytes`` bytes of host memory from the beginning of a tensor on, also past its end."""
    offset = first.storage_offset() * first.element_size()
    return torch.empty(0, dtype=torch.uint8).set_(first.untyped_storage(), offset, (nbytes,), (1,))


def _last_conflict(written: Sequence[_Batch], batch: _Batch) -> int:
    """The last of the written batches that reads stage memory, or writes host memory, which ``batch`` is to use.

    -1 when there is none. All batches are in ascending order, on the stage as in host memory.
    """
    last = bisect_left(written, batch.end, key=lambda w: w.start) - 1
    if last >= 0 and written[last].end <= batch.start:
        last = -1
    for copy in batch.copies:
        found = bisect_left(written, copy.address + copy.host.nbytes, key=lambda w: w.copies[0].address) - 1
        if found > last and any(
            w.address < copy.address + copy.host.nbytes and copy.address < w.address + w.host.nbytes
            for w in written[found].copies
        ):
            last = found
    return last

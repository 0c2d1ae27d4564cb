"""Runs what ranks do together: means of gradients, and weights that go from the rank that updated them to all others.

One process group of its own carries both, so that nothing of the user's comes in between. Before each of them ranks
meet (`ranks.meeting`) and compare what they are about to do.
"""

from __future__ import annotations

import itertools
import math
import os
import socket
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from chunkft_fx.errors import ChunkFTWarning, DistributedNotSupported, RanksDisagree
from chunkft_fx.plan.chunk import Share, Slice
from chunkft_fx.ranks.meeting import Meeting
from chunkft_fx.torch_internals import store_of_ranks

Of = TypeVar("Of")

# Tells apart the models of one process, which all ranks compile in the same order.
_SERIALS = itertools.count()
# What the rate of a link is measured with: long enough for its full rate, small beside any budget.
PROBE_NBYTES = 256 * 2**20
# Bytes of weights that go to all ranks at once, unless a slice has more: what they take on the device meanwhile.
SPREAD_NBYTES = 256 * 2**20


class Ranks:
    """This process by itself: what ranks do together is done already."""

    rank, size = 0, 1

    @property
    def share(self) -> Share:
        """What of every parameter's states this rank keeps."""
        return Share(self.rank, self.size)

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""
        return self.size == 1

    def compare(self, what: str, word: str) -> list[str]:
        """What each rank brings to a meeting about ``what``, by rank; `RankFailed` for one that never comes."""
        return [word]

    def nbytes_per_s(self, device: torch.device) -> float:
        """The bus bandwidth of an all-reduce, in two digits; infinite where nothing is to be hidden, as on the CPU."""
        return math.inf

    def require_same(self, what: str, word: str, change: str) -> None:
        """Raise `RanksDisagree`, on every rank, unless all bring the same; ``change`` says what to do about it."""

    def failing(self) -> AbstractContextManager[None]:
        """While inside, an error of this rank is told to those who wait for it."""
        return nullcontext()

    def means(self, gradients: Sequence[tuple[Of, Tensor]]) -> list[tuple[Of, Tensor]]:
        """Gradients, each of something, averaged over ranks; those that were given stay as they are."""
        return [*gradients]

    def average(self, values: Sequence[Tensor]) -> None:
        """Replace contiguous tensors by their means over ranks, for work that follows on the current stream."""

    def mean(self, value: Tensor) -> dist.Work | None:
        """Begin to replace a contiguous tensor by its mean over ranks; what is returned is to be waited for."""
        return None

    def wait(self, works: Iterable[dist.Work | None]) -> None:
        """Put work that follows on the current stream behind these."""

    def spread(self, pairs: Sequence[tuple[Slice, Tensor]], device: torch.device) -> None:
        """Give all ranks the weights that each has of slices in its `share`; tensors are the slices' own.

        Those in host memory pass through ``device``. Work that follows on the current stream sees the weights.
        """

    def same_everywhere(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        """Give all ranks the values that these tensors have on rank 0."""


class Several(Ranks):
    """This process as one of several ranks, which hold the same model."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        store = store_of_ranks(f"chunkft_fx/{next(_SERIALS)}")
        self._meeting = Meeting(store, self.rank, self.size)
        self._waits_here = device.type != "cuda"
        where = f"{socket.gethostname()} {device}" if device.type == "cuda" else f"{self.rank}"
        self._refuse_shared(self.compare("device", where))
        self._group: Any = dist.new_group(backend="gloo" if self._waits_here else "cpu:gloo,cuda:nccl")

    def compare(self, what: str, word: str) -> list[str]:
        found = [w.split("\n", 1) for w in self._meeting.compare(f"{what}\n{word}")]
        if any(about != what for about, _ in found):
            raise RanksDisagree(
                "ranks do different things: "
                + ", ".join(f"rank {rank} comes to {about!r}" for rank, (about, _) in enumerate(found))
                + "; every rank has to make the same calls in the same order"
            )
        return [word for _, word in found]

    def require_same(self, what: str, word: str, change: str) -> None:
        found = self.compare(what, word)
        other = next((rank for rank, w in enumerate(found) if w != found[0]), None)
        if other is not None:
            raise RanksDisagree(
                f"ranks differ in {what}: rank 0 has {_shown(found[0])}, "
                f"rank {other} has {_shown(found[other])}; {change}"
            )

    def nbytes_per_s(self, device: torch.device) -> float:
        if self._waits_here:
            return math.inf
        probe = torch.zeros(PROBE_NBYTES, dtype=torch.uint8, device=device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):  # the first connects
            begin.record()
            dist.all_reduce(probe, group=self._group)
            end.record()
            end.synchronize()
        found = 2 * (self.size - 1) / self.size * PROBE_NBYTES / (begin.elapsed_time(end) / 1e3)
        slowest = min(float(word) for word in self.compare("the rate of the link", str(found)))
        return float(f"{slowest:.2g}")

    def failing(self) -> AbstractContextManager[None]:
        return self._meeting.failing()

    def means(self, gradients: Sequence[tuple[Of, Tensor]]) -> list[tuple[Of, Tensor]]:
        """As one collective for each dtype: a call takes the host longer than a GPU takes for most of them."""
        made = [g for _, g in gradients]
        for dtype in dict.fromkeys(g.dtype for g in made):  # in the same order on all ranks
            own = [i for i, g in enumerate(made) if g.dtype == dtype]
            flat = torch.cat([made[i].reshape(-1) for i in own])
            self.wait([self.mean(flat)])
            parts = flat.split([made[i].numel() for i in own])
            for i, part in zip(own, parts, strict=True):
                made[i] = part.view(made[i].shape)
        return [(of, g) for (of, _), g in zip(gradients, made, strict=True)]

    def average(self, values: Sequence[Tensor]) -> None:
        self.wait([self.mean(value) for value in values])

    def mean(self, value: Tensor) -> dist.Work | None:
        with self._meeting.together():
            value.div_(self.size)
            work: dist.Work | None = dist.all_reduce(value, group=self._group, async_op=True)
            return work

    def wait(self, works: Iterable[dist.Work | None]) -> None:
        with self._meeting.together():
            for work in works:
                if work is not None:
                    self._end(work)

    def _end(self, work: dist.Work) -> None:
        """Put the current stream behind a collective; on the CPU it is done then, unless a rank fails meanwhile."""
        if self._waits_here:
            self._meeting.until(work.is_completed)
        work.wait()

    def spread(self, pairs: Sequence[tuple[Slice, Tensor]], device: torch.device) -> None:
        """As one collective for up to `SPREAD_NBYTES` of a dtype, of shares that are packed one behind the other."""
        with self._meeting.together():
            for dtype in dict.fromkeys(weight.dtype for _, weight in pairs):
                for batch in _batches([(s, weight) for s, weight in pairs if weight.dtype == dtype]):
                    self._spread(batch, dtype, device)

    def _spread(self, pairs: Sequence[tuple[Slice, Tensor]], dtype: torch.dtype, device: torch.device) -> None:
        shares = [[_part(s, weight, share) for s, weight in pairs] for share in self.share.each]
        sizes = [sum(part.numel() for part in parts) for parts in shares]
        sent = torch.zeros(max(sizes), dtype=dtype, device=device)
        for part, place in zip(shares[self.rank], _places(sent, shares[self.rank]), strict=True):
            place.copy_(part, non_blocking=True)
        came = torch.empty(self.size * max(sizes), dtype=dtype, device=device)
        work = dist.all_gather_into_tensor(came, sent, group=self._group, async_op=True)
        assert work is not None
        self._end(work)
        for rank, (parts, theirs) in enumerate(zip(shares, came.chunk(self.size), strict=True)):
            if rank != self.rank:
                for part, place in zip(parts, _places(theirs, parts), strict=True):
                    part.copy_(place, non_blocking=True)

    def same_everywhere(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        with self._meeting.together():
            for tensor in tensors:
                self._broadcast(tensor, 0, device)()

    def _broadcast(self, value: Tensor, source: int, device: torch.device) -> Any:
        """Begin to copy a tensor from one rank to all; returns what ends it."""
        is_direct = value.is_contiguous() and value.device.type == device.type
        there = value if is_direct else value.to(device, non_blocking=True).contiguous()
        work = dist.broadcast(there, group=self._group, group_src=source, async_op=True)
        assert work is not None

        def finish() -> None:
            self._end(work)
            if not is_direct and source != self.rank:
                value.copy_(there, non_blocking=True)

        return finish

    def _refuse_shared(self, places: Sequence[str]) -> None:
        for rank, place in enumerate(places):
            if place in places[:rank]:
                raise DistributedNotSupported(
                    f"ranks {places.index(place)} and {rank} run on the same GPU ({place}); call "
                    'torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) first, and put the model there'
                )


def ranks_of(device: torch.device) -> Ranks:
    """The ranks that this process is one of, as `torch.distributed` was set up; itself alone where it was not.

    All ranks have to call it together. Raises `DistributedNotSupported` where two of them share a GPU. A process that a
    launcher started as one of several, and that was not set up, is warned: it trains alone.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Several(device)
    if launched() > 1 and not dist.is_initialized():
        warnings.warn(
            f"the launcher has started {launched()} processes, but torch.distributed was not set up in this one, so it "
            "trains by itself; call init_process_group before chunkft_fx.compile to train together",
            ChunkFTWarning,
            stacklevel=6,
        )
    return Ranks()


def launched() -> int:
    """How many processes the launcher has started, as it says in ``WORLD_SIZE``; 1 without one."""
    return max(int(os.environ.get("WORLD_SIZE", "1")), 1)


def on_this_host() -> int:
    """How many ranks share this machine's memory, as the launcher says in ``LOCAL_WORLD_SIZE``."""
    return max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def _batches(pairs: Sequence[tuple[Slice, Tensor]]) -> Iterator[list[tuple[Slice, Tensor]]]:
    """Weights a few at a time, so that what is copied of them stays small."""
    batch: list[tuple[Slice, Tensor]] = []
    filled = 0
    for s, weight in pairs:
        if batch and filled + weight.nbytes > SPREAD_NBYTES:
            yield batch
            batch, filled = [], 0
        batch.append((s, weight))
        filled += weight.nbytes
    if batch:
        yield batch


def _part(s: Slice, weight: Tensor, share: Share) -> Tensor:
    """What of a slice's weight belongs to a share, a view; empty if that is nothing."""
    own = share.within(s)
    if not weight.ndim:
        return weight if own is not None else weight.new_empty(0)
    return weight.narrow(s.dim, 0 if own is None else own.start - s.start, 0 if own is None else own.length)


def _places(flat: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """Views of a flat tensor, one behind the other, in the shapes of these parts."""
    sizes = [part.numel() for part in parts]
    return [v.view(p.shape) for v, p in zip(flat[: sum(sizes)].split(sizes), parts, strict=True)]


def _shown(word: str) -> str:
    return word if len(word) < 80 else f"{word[:77]}..."

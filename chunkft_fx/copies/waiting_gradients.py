"""Waiting gradients: copies gradients to host memory as the backward completes them, and back for the optimizer's step.

They move in the pieces of full coverage through a ring (`copies.states.ring`): one of their own, or that of states in a
backward that updates nothing. A backward that finds a gradient waiting brings it back, adds to it on the device, and
sends the sum: the same numbers, in the same dtypes, that gradients on the device have. The first gradient of a step
waits in the dtype in which the backward made it, a sum in the wide one: host memory and link then carry half of a
bfloat16 model's. A backward that fails leaves gradients that came from earlier ones half added to; they say so when
they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import inf

import torch
from torch import Tensor, nn

from chunkft_fx.copies.host_memory import require_room
from chunkft_fx.copies.states.ring import PieceRing
from chunkft_fx.copies.tier import Tier
from chunkft_fx.errors import WaitingGradientError
from chunkft_fx.gradients.slice_gradient import cut_from
from chunkft_fx.gradients.slices import ActiveSlice, summed
from chunkft_fx.gradients.waiting import Waiting, WaitingGradient, WaitingPart, waiting
from chunkft_fx.graph.layout import front, stage_nbytes, wide_dtype
from chunkft_fx.plan.chunk import Slice
from chunkft_fx.plan.pieces import Pieces
from chunkft_fx.ranks.ranks import Ranks

FAILED = (
    "is a sum of which a backward that failed may have added a part: zero_grad() drops it, and the backward passes of "
    "this step have to be run again"
)
OVERWRITTEN = "was taken off its parameter, and another is in its place in host memory now: copy it before, by clone()"


class WaitingGradients:
    """The gradients of one model in host memory, in these pieces; `bind` says whose, and what moves them."""

    _ring: PieceRing
    _before_writing: Callable[[], None]

    def __init__(self, tier: Tier, pieces: Pieces) -> None:
        self._tier, self._given = tier, pieces
        self._average: Callable[[Sequence[Tensor]], None] = Ranks().average
        self._slices: list[list[ActiveSlice]] = []
        self._rooms: dict[Slice, Tensor] = {}  # uint8
        self._latest: dict[str, Waiting] = {}  # by parameter, what waits or waited last
        self._new: dict[str, list[WaitingPart]] = {}  # of the backward under way
        self._held: list[Tensor] = []  # gradients that work beside the backward may still read
        self._group: int | None = None

    def is_of(self, pieces: Pieces) -> bool:
        """Whether these are gradients in just these pieces, through whatever number of buffers."""
        return self._given.chunks == pieces.chunks

    def bind(self, parameters: Mapping[str, nn.Parameter], ring: PieceRing, before_writing: Callable[[], None]) -> None:
        """Be the gradients of these parameters, moved by ``ring``, none of whose copies are under way.

        ``before_writing`` is called before the user's values take the place of what waits.

        A parameter that takes the place of one of the same name has none yet, others keep what waits.
        """
        self._ring, self._before_writing = ring, before_writing
        known = {s.name: s.parameter for slices in self._slices for s in slices}
        if any(known.get(s.name) is not parameters[s.name] for piece in self._given for s in piece.slices):
            self._slices = [[ActiveSlice(s, parameters[s.name]) for s in piece.slices] for piece in self._given]

    def is_through(self, ring: PieceRing) -> bool:
        """Whether this ring moves them."""
        return self._ring is ring

    def check(self) -> list[ActiveSlice]:
        """The slices whose gradients wait; `WaitingGradientError` if one waits that cannot be used."""
        return [s for slices in self._slices for s in slices if self._own(s) is not None]

    def average_by(self, average: Callable[[Sequence[Tensor]], None]) -> None:
        """What replaces sums by their means over ranks, in the backward that comes."""
        self._average = average

    def begin(self) -> None:
        """Begin a backward, checked before anything runs of it.

        Raises `WaitingGradientError` if a gradient waits that cannot be added to, `HostMemoryExceeded` if there is no
        room for sums, which take more than what is added up.
        """
        sums = self.check()
        widths = (wide_dtype(s.parameter.dtype).itemsize for s in sums)
        needed = (stage_nbytes(s.weight().numel() * width) for s, width in zip(sums, widths, strict=True))
        wider = sum(max(n - self._rooms[s.slice].numel(), 0) for s, n in zip(sums, needed, strict=True))
        if wider:
            require_room(wider)

    def parts(self, piece: int) -> dict[str, WaitingPart]:
        """What waits of a piece now, by the parameters' names, whatever becomes of their gradients."""
        return {name: replace(part, factors=list(part.factors)) for name, part in self._waiting(piece).items()}

    def fetch_states(self, piece: int, parts: Mapping[str, WaitingPart] | None = None) -> None:
        """Begin to bring back what waits of a piece, or these `parts` of it."""
        found = self._waiting(piece) if parts is None else parts
        host = [p.host for p in found.values() if p.host is not None]
        if host:
            self._ring.fetch(piece, host)

    def update(self, piece: int, names: Sequence[str], gradients: Sequence[Tensor], group: int) -> None:
        """Add contributions to the gradients of a piece, those of whole parameters, beside the backward that goes on.

        They are held until the first of another ``group`` comes, which stands behind the next backward call.
        """
        if group != self._group:
            self._join()
            self._group = group
        self._held += gradients
        by_name: dict[str, list[Tensor]] = {}
        for name, gradient in zip(names, gradients, strict=True):
            by_name.setdefault(name, []).append(gradient)
        with self._ring.beside():
            self._add(piece, by_name)

    def write_states(self, piece: int) -> None:
        """Begin to take a piece to host memory."""
        with self._ring.beside():
            self._ring.write_back(piece)

    def complete(self) -> None:
        """End a backward: parameters have the gradients that it sent."""
        self._join()
        for s in {s.name: s for slices in self._slices for s in slices if s.name in self._new}.values():
            value, parts, p = self._own(s), self._new.pop(s.name), s.parameter
            if value is not None:
                value.parts[:] = parts
                continue
            wide = wide_dtype(p.dtype)
            value = Waiting(s.name, p.shape, wide, self._ring.device, parts, self._bring, self._send)
            p.grad, self._latest[s.name] = WaitingGradient(value), value

    def abandon(self) -> None:
        """A backward failed: what it began is waited for, and sums that it has changed cannot be read any more."""
        self._join()
        self._ring.abandon()
        for name in self._new:
            if name in self._latest:
                self._latest[name].problem = FAILED
        self._new = {}

    def gradients(self, piece: int, parts: Mapping[str, WaitingPart] | None = None) -> dict[str, Tensor]:
        """What waits of a fetched piece, by the parameters' names: each slice's on the device, in its shape.

        ``parts`` are those that it was fetched by.

        Ready for work on the current stream; as it waits, or in the wide dtype where it is to be multiplied or is zero.
        """
        found = self._waiting(piece) if parts is None else parts
        there = iter(self._ring.tensors(piece) if self._ring.is_fetched(piece) else ())
        made = {}
        for s in self._slices[piece]:
            if s.name in found:
                part = found[s.name]
                made[s.name] = self._made(s, part, None if part.host is None else next(there))
        return made

    def let_go(self, piece: int) -> None:
        """Free the buffer of a piece whose gradients were used."""
        if self._ring.is_fetched(piece):
            self._ring.let_go(piece)

    def _made(self, s: ActiveSlice, part: WaitingPart, value: Tensor | None) -> Tensor:
        wide = wide_dtype(s.parameter.dtype)
        if value is None:
            return torch.zeros(s.weight().shape, dtype=wide, device=self._ring.device)
        value = part.scaled(value.to(wide, copy=True)) if part.factors else value
        return value.movedim(0, s.dim) if s.parameter.ndim else value.view(())

    def _add(self, piece: int, by_name: Mapping[str, Sequence[Tensor]]) -> None:
        before = self.gradients(piece)
        graded = [s for s in self._slices[piece] if s.name in by_name]
        totals = []
        for s in graded:
            total = summed([front(cut_from(g, s.slice), s.dim) for g in by_name[s.name]])
            earlier = before.get(s.name)
            if earlier is None:  # one that does not wait was set by the user, or came from outside of the call
                earlier = s.grad
            if earlier is not None:
                total = front(earlier, s.dim).to(wide_dtype(s.parameter.dtype), copy=True).add_(total)
            totals.append(total)
            self._new.setdefault(s.name, [])
        kept = [self._room(s.slice, total) for s, total in zip(graded, totals, strict=True)]
        targets = self._ring.take(piece, kept)
        for total, target in zip(totals, targets, strict=True):
            target.copy_(total)
        self._average(targets)
        for s, host, target in zip(graded, kept, targets, strict=True):
            if s.name not in before and s.name in self._latest:
                self._latest.pop(s.name).problem = OVERWRITTEN
            self._new[s.name].append(self._part(s.slice, host, target))

    def _waiting(self, piece: int) -> dict[str, WaitingPart]:
        """The parts that wait of a piece, by the names of their parameters."""
        found = {}
        for s in self._slices[piece]:
            value = self._own(s)
            if value is not None:
                found[s.name] = next(p for p in value.parts if p.slice == s.slice)
        return found

    def _own(self, s: ActiveSlice) -> Waiting | None:
        """What waits here for a slice's parameter; `WaitingGradientError` for what waits for another."""
        value = waiting(s.parameter.grad)
        if value is None:
            return None
        if value.name != s.name or self._latest.get(s.name) is not value:
            raise WaitingGradientError(
                f"{s.name!r} was given a gradient of {value.name!r} that waits in host memory, and not for this "
                "parameter's step; give it a copy on the device, p.grad.clone()"
            )
        value.require()
        return value

    def _part(self, s: Slice, host: Tensor, value: Tensor) -> WaitingPart:
        wide = wide_dtype(value.dtype)
        norms = [torch.linalg.vector_norm(value, order, dtype=wide) for order in (2, inf)]
        return WaitingPart(s, host, *norms)

    def _room(self, s: Slice, value: Tensor) -> Tensor:
        """Host memory for a slice's gradient, which has the cut dimension in front."""
        room = self._rooms.get(s)
        if room is None or room.numel() < value.nbytes:
            room = self._rooms[s] = self._tier.allocate((stage_nbytes(value.nbytes),), torch.uint8)
        return room[: value.nbytes].view(value.dtype).view(value.shape)

    def settle(self) -> None:
        """Put work that follows on the current stream behind all copies to host memory."""
        self._ring.settle()

    def brought(self, piece: int) -> dict[str, Tensor]:
        """As `gradients`, in the wide dtype, of a piece that was not fetched: copied by the current stream itself.

        The ring can be full of other things then. Called behind `settle`.
        """
        found = self._waiting(piece)
        return {s.name: self._copied(s, found[s.name]) for s in self._slices[piece] if s.name in found}

    def _bring(self, part: WaitingPart) -> Tensor:
        """A part as the user reads it: a copy on the device, behind the copies out."""
        s = next(s for slices in self._slices for s in slices if s.slice == part.slice)
        self._ring.settle()
        return self._copied(s, part)

    def _copied(self, s: ActiveSlice, part: WaitingPart) -> Tensor:
        wide = wide_dtype(s.parameter.dtype)
        there = None if part.host is None else part.host.to(self._ring.device, non_blocking=True)
        made = self._made(s, part, there)
        return made.to(wide, copy=there is part.host and not part.factors)

    def _send(self, s: Slice, values: Tensor) -> WaitingPart:
        """A slice's values, as the user changed them, in host memory: copies in that follow come behind it."""
        values = front(values, s.dim).contiguous()
        self._before_writing()
        self._ring.settle()
        host = self._room(s, values)
        host.copy_(values, non_blocking=True)
        self._ring.follow()
        return self._part(s, host, values)

    def _join(self) -> None:
        """Have what follows wait for the work beside the backward, for which nothing needs to be held any more."""
        self._ring.join()
        self._held.clear()
        self._group = None

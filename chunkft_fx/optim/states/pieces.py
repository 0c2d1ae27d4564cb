"""Runs the updates of a step that covers all parameters, piece by piece: at the step, or as a program's nodes ask for.

States of a piece come to the device, its weights and states are changed, the states go back (`copies.states.ring`). A
weight that stays in host memory travels with its states. What a step has updated is remembered until it is complete:
should it fail halfway, some parameters are a step ahead of the others, and nothing may go on as if they were not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from chunkft_fx.copies.states.ring import PieceRing
from chunkft_fx.copies.waiting_gradients import WaitingGradients
from chunkft_fx.errors import OutsideGradient, PartialStep
from chunkft_fx.gradients.slice_gradient import cut_from
from chunkft_fx.gradients.slices import ActiveSlice, summed, within_slice
from chunkft_fx.gradients.used import UsedGradient, drop_used
from chunkft_fx.gradients.waiting import WaitingPart, waiting
from chunkft_fx.graph.layout import front, wide_dtype
from chunkft_fx.module.training import Training
from chunkft_fx.optim.states.staging import StagedStates
from chunkft_fx.optim.update import StagedSlice
from chunkft_fx.plan.pieces import Pieces
from chunkft_fx.runtime.guarded_parameter import is_guardable
from chunkft_fx.torch_internals import by_itself

# Updates these slices of one piece; the number of the piece is for stochastic rounding.
Apply = Callable[[Sequence[StagedSlice], int], None]


@dataclass
class _StepUpdates:
    """What the updates of an optimizer's step go by: pieces in order, what moves gradients apart from states, and how.

    ``parts`` are the gradients as they wait at the step, of a step whose updates are late.
    """

    order: Sequence[int]
    apart: WaitingGradients | None
    apply: Apply
    parts: Mapping[int, Mapping[str, WaitingPart]] | None = None

    def gradients(self, piece: int) -> dict[str, Tensor]:
        """The gradients of a fetched piece of a late step, on the device, by the names of its parameters."""
        assert self.apart is not None
        assert self.parts is not None
        return self.apart.gradients(piece, self.parts[piece])


class PieceUpdates:
    """The updates of ``pieces``, whose states pass through ``ring``; ``apply`` is the optimizer's update."""

    def __init__(self, model: Training, states: StagedStates, ring: PieceRing, pieces: Pieces, apply: Apply) -> None:
        self._model, self._states, self._ring, self._apply, self._given = model, states, ring, apply, pieces
        parameters = dict(model.named_parameters())
        self._slices = [[ActiveSlice(s, parameters[s.name]) for s in piece.slices] for piece in pieces]
        self._pieces_of: dict[str, int] = {}
        for slices in self._slices:
            for s in slices:
                self._pieces_of[s.name] = self._pieces_of.get(s.name, 0) + 1
        self._done: dict[int, tuple[str, ...]] = {}  # of the step under way: by piece, what was updated of it
        self._left: dict[str, int] = {}  # of the step under way: the pieces of a parameter that are still to come
        self._updated: set[str] = set()  # by backward passes since the optimizer's last step
        self._held: list[Tensor] = []  # gradients that updates beside the backward may still read
        self._group: int | None = None
        self._waiting: WaitingGradients | None = None  # for the step under way, where any of its gradients wait
        self.is_broken = False

    @property
    def ring(self) -> PieceRing:
        """What states pass through."""
        return self._ring

    def is_of(self, pieces: Pieces, ring: PieceRing) -> bool:
        """Whether these are the updates of just these pieces, through this ring."""
        return self._given is pieces and self._ring is ring

    def at_step(self, apply: Apply) -> None:
        """Update everything that has a gradient by ``apply``, one piece behind the other.

        What may be late is done beside what follows (`runtime.late_updates`), by gradients as they are now.
        """
        self.begin()
        step = _StepUpdates(self._graded_pieces(), self._with_own_ring(), apply)
        if not self._may_be_late():
            try:
                for at in range(len(step.order)):
                    self._advance(step, at)
            except BaseException:
                self._abandon_step(step)
                raise
            self._end()
            return
        assert step.apart is not None, "gradients that wait for a step have a ring of their own"
        step.parts = {i: step.apart.parts(i) for i in step.order}
        # from now on a backward through weights as they were is refused, however late they change
        parameters = list(dict.fromkeys(s.parameter for s in self._all()))
        torch.autograd.graph.increment_version(parameters)
        names = [[s.name for s in self._slices[i]] for i in step.order]
        put, abandon = partial(self._put, step), partial(self._abandon_step, step)
        self._model.late.begin(self._ring.device, names, put, abandon, parameters)

    def _graded_pieces(self) -> list[int]:
        return [i for i, slices in enumerate(self._slices) if any(s.parameter.grad is not None for s in slices)]

    def _put(self, step: _StepUpdates, at: int) -> torch.cuda.Event | None:
        """Put an update of a late step beside the current stream, behind what that had when the step was called.

        Who waits for it may be anywhere: in a mode, a context or a transform of torch, none of which it is done in.
        """
        with by_itself(), self._ring.beside(is_behind=at == 0):
            self._advance(step, at)
            event = self._ring.event()
        if at == len(step.order) - 1:
            self._done, self._left, self._waiting = {}, {}, None
        return event

    def _advance(self, step: _StepUpdates, at: int) -> None:
        """Update a piece of a step, and fetch the next for which there is a buffer."""
        depth, piece = self._given.depth, step.order[at]
        for i in step.order[:depth] if at == 0 else ():
            self._fetch(step, i)
        there = self._came_back(piece) if step.parts is None else step.gradients(piece)
        self._update(piece, self._graded(piece, there), step.apply)
        self.write_states(piece)
        if step.apart is not None:
            step.apart.let_go(piece)
        if at + depth < len(step.order):
            self._fetch(step, step.order[at + depth])

    def _abandon_step(self, step: _StepUpdates) -> None:
        self.abandon()
        if step.apart is not None:
            step.apart.abandon()

    def _may_be_late(self) -> bool:
        """Whether updates of this step can be done beside what follows, and no one sees an old weight.

        Gradients on the device could be freed, and memory that a weight shares with another tensor be read through that
        one: then the step waits.
        """
        if not self._model.plan.policy.updates_late or self._states.travelling:
            return False
        model, parameters = self._model.plain, dict.fromkeys(s.parameter for s in self._all())
        tensors = [t for t in (*model.parameters(), *model.buffers()) if t.numel()]
        return (
            len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
            and all(map(is_guardable, parameters))
            and all(p.grad is None or waiting(p.grad) for p in parameters)
            and any(p.grad is not None for p in parameters)
        )

    def _fetch(self, step: _StepUpdates, piece: int) -> None:
        self.fetch_states(piece)
        if step.apart is not None:
            step.apart.fetch_states(piece, None if step.parts is None else step.parts[piece])

    def _graded(self, piece: int, there: Mapping[str, Tensor]) -> list[tuple[ActiveSlice, Tensor]]:
        """The slices of a piece that have a gradient: ``there``, come back from host memory, or on the device."""
        on_device = {s.name: s.grad for s in self._slices[piece] if s.name not in there}
        found = dict(there) | {name: gradient for name, gradient in on_device.items() if gradient is not None}
        return [(s, found[s.name]) for s in self._slices[piece] if s.name in found]

    def _came_back(self, piece: int) -> dict[str, Tensor]:
        """The gradients of a piece that waited in host memory, by the names of its parameters."""
        if self._waiting is None:
            return {}
        return self._waiting.gradients(piece) if self._with_own_ring() else self._waiting.brought(piece)

    def _with_own_ring(self) -> WaitingGradients | None:
        """The gradients that wait in host memory if another ring than that of states moves them."""
        found = self._waiting
        return None if found is None or found.is_through(self._ring) else found

    def begin(self) -> None:
        """Begin a step; `PartialStep` if the step before was left halfway, `WaitingGradientError` for a spoiled sum."""
        self.refuse_broken()
        self._model.late.finish()
        self._states.before_step()
        self._waiting = self._model.waiting if any(waiting(s.parameter.grad) for s in self._all()) else None
        if self._waiting is not None:
            self._waiting.check()
            self._waiting.settle()
        self._states.settle_ties()
        self._done, self._left = {}, {}

    def complete(self) -> None:
        """End a backward that updates: of the gradients that it has used nothing can be read from now on."""
        used = {name for names in self._done.values() for name in names}
        self._end()
        for s in (s for s in self._all() if s.name in used):
            p = s.parameter
            p.grad = UsedGradient(s.name, p.shape, wide_dtype(p.dtype), self._ring.device)

    def _end(self) -> None:
        """End a step: everything that had a gradient was updated, and weights in host memory can be fetched again."""
        self._join()
        self._done, self._left, self._waiting = {}, {}, None
        if self._states.travelling:
            self._ring.settle()

    def refuse_broken(self) -> None:
        """Raise `PartialStep` if a step was left halfway."""
        if self.is_broken:
            names = list(dict.fromkeys(n for done in self._done.values() for n in done))
            raise PartialStep(
                f"a step failed after it had updated {len(names)} of {len(self._pieces_of)} parameters "
                f"({', '.join(names[:5])}{' and others' * (len(names) > 5)}), which are a step ahead of the others; "
                "load a checkpoint of model and optimizer, or call optimizer.accept_partial_step() to go on from here"
            )

    def accept(self) -> None:
        """Go on from a step that was left halfway."""
        self.is_broken = False
        self._done, self._left = {}, {}

    def fetch_states(self, piece: int) -> None:
        """Begin to bring a piece's states in."""
        self._ring.fetch(piece, [t for s in self._own(piece) for t in self._travelling(s)])

    def update(self, piece: int, names: Sequence[str], gradients: Sequence[Tensor], group: int) -> None:
        """Update a piece by the contributions to its parameters' gradients, beside what ``parameter.grad`` holds.

        It runs beside the backward calls that follow. Gradients are held until the first update of another ``group``
        comes, which stands behind the next backward call: that call has hidden it.
        """
        if group != self._group:
            self._join()
            self._group = group
        self._held += gradients
        with self._ring.beside():
            self._update_beside(piece, names, gradients)

    def _update_beside(self, piece: int, names: Sequence[str], gradients: Sequence[Tensor]) -> None:
        by_name: dict[str, list[Tensor]] = {}
        for name, gradient in zip(names, gradients, strict=True):
            by_name.setdefault(name, []).append(gradient)
        graded = []
        there = self._came_back(piece)
        for s in self._slices[piece]:
            if s.name in by_name:
                held = there.get(s.name)
                if held is None:
                    held = s.grad
                parts = [cut_from(g, s.slice) for g in by_name[s.name]]
                graded.append((s, summed([held, *parts] if held is not None else parts)))
        graded = self._model.ranks.means(graded)
        self._update(piece, graded, self._apply)
        for s, _ in graded:
            self._left[s.name] = self._left.get(s.name, self._pieces_of[s.name]) - 1
            self._updated.add(s.name)
            if not self._left[s.name]:
                self._held += [s.parameter.grad] if s.parameter.grad is not None else []
                s.parameter.grad = None

    def _all(self) -> Iterator[ActiveSlice]:
        return (s for slices in self._slices for s in slices)

    def _join(self) -> None:
        """Have what follows wait for the updates so far, of which nothing needs to be held any more."""
        self._ring.join()
        self._held.clear()
        self._group = None

    def write_states(self, piece: int) -> None:
        """Begin to take a piece's states back."""
        with self._ring.beside():
            self._ring.write_back(piece)

    def refuse_late(self, graded: Sequence[ActiveSlice]) -> None:
        """Raise `OutsideGradient` for a gradient that came behind its parameter's update in the backward.

        Called by the optimizer's step, with which another begins.
        """
        late = next((s.name for s in graded if s.name in self._updated), None)
        if late is not None:
            raise OutsideGradient(
                f"{late!r} got a gradient behind its update within the backward, and would be updated twice in a step: "
                "a weight that is also used outside of the compiled call, or a backward inside no_sync() behind one "
                'outside, needs update="step"; zero_grad() drops that gradient'
            )
        self._updated.clear()
        for s in self._all():
            drop_used(s.parameter)

    def abandon(self) -> None:
        """A step failed: what was updated goes back to host memory, and nothing goes on before someone has decided."""
        self._join()
        for piece in self._done:
            if self._ring.is_fetched(piece):
                self._ring.write_back(piece)
        self._ring.abandon()
        self.is_broken = bool(self._done)

    def settle(self) -> None:
        """Let work that follows on the current stream see every state and weight in host memory."""
        self._ring.settle()

    def _update(self, piece: int, graded: Sequence[tuple[ActiveSlice, Tensor]], apply: Apply) -> None:
        staged = iter(self._ring.tensors(piece))
        there = {s.name: [next(staged) for _ in self._travelling(s)] for s in self._own(piece)}
        entries = []
        for s, gradient in graded:
            own = self._states.own(s)
            if own is None:
                continue
            tensors = there[s.name]
            weight = own.weight()
            if self._travels(own):
                weight, tensors = tensors[0].movedim(0, s.dim) if weight.ndim else tensors[0].view(()), tensors[1:]
            states = dict(zip(self._states.layouts(s.parameter), tensors, strict=True))
            part, counts = within_slice(s, own, gradient), self._states.counts(own)
            entries.append(StagedSlice(own.slice, s.parameter, weight, part, states, counts))
        self._states.before_change([e.slice for e in entries])
        self._done[piece] = tuple(s.name for s, _ in graded)  # from now on, should the update fail halfway
        apply(entries, piece)
        for entry in entries:
            self._states.count(entry)
        self._states.spread([s for s, _ in graded])

    def _own(self, piece: int) -> list[ActiveSlice]:
        """The slices of a piece, as far as their states are kept here."""
        return [own for s in self._slices[piece] if (own := self._states.own(s)) is not None]

    def _travelling(self, s: ActiveSlice) -> list[Tensor]:
        """What of a slice passes through the ring: its states, behind its weight if that stays in host memory."""
        weight = [front(s.weight(), s.dim)] if self._travels(s) else []
        return weight + self._states.host(s)

    def _travels(self, s: ActiveSlice) -> bool:
        """Whether a slice's weight is copied with its states; one that is not one run of memory is left to the update.

        Beside a CPU nothing is copied.
        """
        return s.name in self._states.travelling and front(s.weight(), s.dim).is_contiguous()

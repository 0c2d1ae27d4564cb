"""Runs an optimizer's update on the active slices, a bounded part at a time, with torch's own operators.

What every update needs is done here: a low-precision weight that was changed from outside becomes its master first, a
weight in host memory is copied to where the model runs and back, gradients are scaled, and weights are rounded from
their masters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from chunkft_fx.gradients.slices import ActiveSlice
from chunkft_fx.graph.layout import front, wide_dtype
from chunkft_fx.kernels.masters import reconcile
from chunkft_fx.optim.states.numbers import Numbers
from chunkft_fx.optim.states.step_counts import Counts, Run, within
from chunkft_fx.plan.chunk import Slice
from chunkft_fx.plan.state_spec import MASTER, StateSpec

# Elements updated at once where slices may be taken apart: bounds the temporary memory, 64 MiB of float32 a tensor.
PART_NUMEL = 2**24


@dataclass(frozen=True)
class StagedSlice:
    """A slice that is to be updated: its weight, by its gradient, with its staged states by name.

    ``counts`` are the step counts of its whole ``parameter`` so far. An update that keeps numbers of runs puts the new
    ones into ``after``, by the start of the run.
    """

    slice: Slice
    parameter: Tensor
    weight: Tensor
    gradient: Tensor
    states: Mapping[str, Tensor]
    counts: Counts
    after: dict[int, Numbers] = field(default_factory=dict)


class Update(Protocol):
    """The update of one parameter group's slices, ready to run."""

    def apply(self) -> None:
        """Change weights and states."""


@dataclass(frozen=True)
class Part:
    """What an update changes in place: a weight and its states, by its gradient.

    All tensors are contiguous, in float32 (float64 for float64 parameters) and on one device; the weight is the master
    of a low-precision one. An optimizer that updates elements alone sees the cut dimension in front; one whose spec
    ``is_whole`` sees parameters as they are (states of one that is not cut along dimension 0 are then views). ``step``
    counts the updates of these elements, this one included. ``numbers`` are what an optimizer keeps of them beside
    tensors, from the update before; it puts those from this one into ``after``.
    """

    weight: Tensor
    gradient: Tensor
    states: Mapping[str, Tensor]
    step: int
    numbers: Mapping[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)


# An optimizer's arithmetic: one step on these parts in place, with a parameter group's options.
Rule = Callable[[Sequence[Part], Mapping[str, Any]], None]


@dataclass(frozen=True)
class _Piece:
    """A part before it is made ready: the weight where it lives, and its master where that is another tensor.

    ``run`` has the counts of it before the update, ``after`` is that of its slice.
    """

    home: Tensor
    master: Tensor | None
    gradient: Tensor
    states: Mapping[str, Tensor]
    run: Run
    after: dict[int, Numbers]

    def cut(self, start: int, length: int) -> _Piece:
        home, gradient = self.home.narrow(0, start, length), self.gradient.narrow(0, start, length)
        master = None if self.master is None else self.master.narrow(0, start, length)
        states = {key: t.narrow(0, start, length) for key, t in self.states.items()}
        return _Piece(home, master, gradient, states, self.run, self.after)

    def ready(self, scale: Tensor | None) -> Part:
        """The part where the gradient is, the master brought up to date."""
        gradient = self.gradient.to(wide_dtype(self.gradient.dtype))
        if scale is not None:
            gradient = gradient * scale
        # one layout for all operands: vectorised loops then round the same way
        if self.master is None:
            weight = self.home.to(gradient.device, non_blocking=True).contiguous()
        else:
            weight = self.master
            reconcile(*(t if t.ndim else t.view(1) for t in (weight, self.home)))
        return Part(weight, gradient.contiguous(), self.states, self.run.step + 1, dict(self.run.numbers))

    def take(self, part: Part) -> None:
        """Have the updated weight where it lives, and the new numbers; waits for it if that is host memory."""
        if part.weight is not self.home:
            self.home.copy_(part.weight.to(self.home.dtype))
        if part.after:
            self.after[self.run.start] = tuple(part.after.items())


class PartsUpdate:
    """One step of ``rule`` for one parameter group's slices, which all have gradients.

    ``options`` are the group's; gradients count times ``scale`` (0-d, on their device). A slice in which step counts
    differ is updated run by run. Temporary memory is that of `PART_NUMEL` elements, or of the largest parameter where
    the spec ``is_whole``.
    """

    def __init__(
        self,
        rule: Rule,
        spec: StateSpec,
        entries: Sequence[StagedSlice],
        options: Mapping[str, Any],
        scale: Tensor | None,
    ) -> None:
        self._rule, self._spec, self._options, self._scale = rule, spec, options, scale
        make = self._whole if spec.is_whole else self._runs
        self._pieces = [piece for entry in entries for piece in make(entry)]

    def apply(self) -> None:
        """Change weights and states."""
        for batch in self._batches():
            parts = [piece.ready(self._scale) for piece in batch]
            self._rule(parts, self._options)
            for piece, part in zip(batch, parts, strict=True):
                piece.take(part)

    def _whole(self, entry: StagedSlice) -> Iterator[_Piece]:
        """A parameter as it is."""
        s, layouts = entry.slice, self._spec.layouts(entry.parameter)

        def uncut(t: Tensor) -> Tensor:
            return t.movedim(0, s.dim) if entry.weight.ndim else t.view(())

        states = {key: uncut(t) if layouts[key].is_sliced else t for key, t in entry.states.items()}
        (run,) = entry.counts
        yield _Piece(entry.weight, states.pop(MASTER, None), entry.gradient.detach(), states, run, entry.after)

    def _runs(self, entry: StagedSlice) -> Iterator[_Piece]:
        """A slice with the cut dimension in front, cut where step counts differ."""
        s = entry.slice
        home = front(entry.weight, s.dim)
        states = {key: t.view(home.shape) for key, t in entry.states.items()}
        runs = within(entry.counts, s.start, s.length)
        whole = _Piece(home, states.pop(MASTER, None), front(entry.gradient, s.dim), states, runs[0], entry.after)
        for run in runs:
            yield replace(whole.cut(run.start - s.start, run.length), run=run)

    def _batches(self) -> Iterator[list[_Piece]]:
        """The pieces a few at a time, taken apart where they are large and may be."""
        batch: list[_Piece] = []
        filled = 0
        for piece in self._small_pieces():
            if batch and filled + piece.home.numel() > PART_NUMEL:
                yield batch
                batch, filled = [], 0
            batch.append(piece)
            filled += piece.home.numel()
        if batch:
            yield batch

    def _small_pieces(self) -> Iterator[_Piece]:
        for piece in self._pieces:
            if self._spec.is_whole:
                yield piece
                continue
            size = piece.home.shape[0]
            indices = max(1, PART_NUMEL * size // piece.home.numel())
            yield from (piece.cut(start, min(indices, size - start)) for start in range(0, size, indices))


def clip_factor(graded: Sequence[ActiveSlice], max_norm: float) -> tuple[Tensor, Tensor]:
    """The norm of all these slices' gradients, and what they are multiplied by (0-d, on their device).

    It is what `torch.nn.utils.clip_grads_with_norm_` multiplies by.
    """
    norm = get_total_norm([s.grad for s in graded if s.grad is not None])
    return norm, torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def after_host_weights(graded: Sequence[ActiveSlice], device: torch.device) -> torch.cuda.Event | None:
    """An event after an update on ``device`` that writes weights in host memory, which anyone may read later."""
    if device.type != "cuda" or all(s.parameter.is_cuda for s in graded):
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event

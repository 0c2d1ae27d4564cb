"""The slices that are active right now, and the schedule that moves from chunk to chunk."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from chunkft_fx.errors import OptionError
from chunkft_fx.gradients.slice_gradient import SliceGradient, cut_from, part_of
from chunkft_fx.plan import position
from chunkft_fx.plan.chunk import Slice

ORDERS = ("ascending", "descending", "random")


@dataclass(eq=False)
class ActiveSlice:
    """One active slice of a parameter, and the part of ``parameter.grad`` that belongs to it."""

    slice: Slice
    parameter: nn.Parameter

    @property
    def name(self) -> str:
        return self.slice.name

    @property
    def dim(self) -> int:
        return self.slice.dim

    @property
    def start(self) -> int:
        return self.slice.start

    @property
    def length(self) -> int:
        return self.slice.length

    @property
    def grad(self) -> Tensor | None:
        """The slice's gradient: its shape, on the device that the model runs on; None where there is none.

        It is float32 (float64 for a float64 parameter), adds up over backward calls, and shares the memory of
        ``parameter.grad``.
        """
        return part_of(self.parameter.grad, self.slice)

    @grad.setter
    def grad(self, gradient: Tensor | None) -> None:
        if gradient is not None and not self.slice.is_whole:
            gradient = SliceGradient(gradient, self.slice, self.parameter.shape)
        self.parameter.grad = gradient

    def add(self, gradient: Tensor) -> None:
        """Add a gradient from `handed` to the parameter's, where autograd does not."""
        held = self.parameter.grad
        if held is None:
            self.parameter.grad = gradient.detach()
        else:
            held.add_(gradient)

    def weight(self) -> Tensor:
        """The slice of the parameter itself: a view that shares its memory, without autograd."""
        return cut_from(self.parameter.detach(), self.slice)

    def handed(self, gradient: Tensor) -> Tensor:
        """A gradient of the slice (its shape, any floating dtype) as autograd is to give it to the parameter.

        One that is wider than the parameter was made for this slice alone (a sum of contributions, or
        `passes.lower_triton`'s operator), and the parameter keeps it as it is. Of another one a parameter without
        gradient keeps a copy, which is made here: whoever hands gradients over one by one, letting go of each, holds
        one twice at a time, whatever order autograd takes. One that has a gradient adds it up as it is.
        """
        wide = torch.promote_types(self.parameter.dtype, torch.float32)
        is_own = gradient.dtype == wide != self.parameter.dtype
        if not is_own and self.parameter.grad is None:
            gradient, is_own = gradient.to(wide, copy=True), True
        if is_own and self.slice.is_whole:
            return gradient
        return SliceGradient(gradient, self.slice, self.parameter.shape, wide, is_new=not is_own)


@dataclass
class Arrivals:
    """Where gradients came from since the last optimizer step."""

    through: bool = False  # a backward of the compiled module ran
    outside: bool = False  # autograd gave a parameter a gradient, wherever it came from


@dataclass
class ChunkSchedule:
    """Which chunk is active: ``interval`` optimizer steps each, every sweep visits every chunk once.

    ``order="random"`` draws a new permutation for each sweep from ``seed``, so that a run can be
    repeated and resumed: the state is three integers. ``cuts`` is the digest of the plan's chunks
    (`chunkft_fx.plan.position.cuts_digest`), empty where there is no plan.
    """

    chunks: int
    order: str = "ascending"
    interval: int = 1
    seed: int = 0
    sweep: int = 0
    position: int = 0
    steps: int = 0
    cuts: str = ""
    _permutations: dict[int, list[int]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise OptionError(f"order={self.order!r} is not known; choose one of {', '.join(ORDERS)}")
        if not isinstance(self.interval, int) or self.interval < 1:
            raise OptionError(f"interval={self.interval!r} must be a whole number of optimizer steps, 1 or more")

    def permutation(self, sweep: int) -> list[int]:
        """The order in which one sweep visits the chunks."""
        if self.order == "ascending":
            return list(range(self.chunks))
        if self.order == "descending":
            return list(reversed(range(self.chunks)))
        if sweep not in self._permutations:
            order = list(range(self.chunks))
            random.Random(self.seed * 1_000_003 + sweep).shuffle(order)
            self._permutations = {sweep: order}
        return self._permutations[sweep]

    @property
    def chunk(self) -> int:
        """The index of the active chunk."""
        return self.permutation(self.sweep)[self.position]

    @property
    def is_at_start(self) -> bool:
        """Whether no step of the current sweep was counted."""
        return self.position == self.steps == 0

    def advance(self) -> bool:
        """Count one optimizer step; returns True when another chunk became active."""
        self.steps += 1
        if self.steps < self.interval:
            return False
        before = self.chunk
        self.steps = 0
        self.position += 1
        if self.position == self.chunks:
            self.position, self.sweep = 0, self.sweep + 1
        return self.chunk != before

    def activate(self, chunk: int) -> None:
        """Make ``chunk`` active within the current sweep, at the start of its interval."""
        if not 0 <= chunk < self.chunks:
            raise OptionError(f"chunk {chunk} does not exist; the plan has chunks 0 to {self.chunks - 1}")
        self.position = self.permutation(self.sweep).index(chunk)
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        """The schedule's position, for checkpoints, with what it means nothing without (`chunkft_fx.plan.position`)."""
        counts = {"sweep": self.sweep, "position": self.position, "steps": self.steps, "chunks": self.chunks}
        return counts | {"order": self.order, "seed": self.seed, "interval": self.interval, "cuts": self.cuts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a position saved by `state_dict`, if it was saved with the same number of chunks.

        With another number of chunks the position has no meaning here: nothing changes, with a `ChunkFTWarning`.
        Raises `CheckpointMismatch` when ``state`` is not such a position, or means something else here: in another
        order, with another seed of a random order, over other cuts, within another interval.
        """
        position.check(state)
        if state["chunks"] != self.chunks:
            position.warn_of_other_count(state, self.chunks)
            return
        position.require_same(state, self.state_dict())
        self.sweep, self.position, self.steps = state["sweep"], state["position"], state["steps"]

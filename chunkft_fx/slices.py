"""The slices that are active right now, and the schedule that moves from chunk to chunk."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from chunkft_fx import position
from chunkft_fx.errors import OptionError
from chunkft_fx.plan import Slice

ORDERS = ("ascending", "descending", "random")


@dataclass(eq=False)
class ActiveSlice:
    """One active slice of a parameter and its gradient.

    ``grad`` has the slice's shape, on the device that the model runs on, in float32 (float64 for a float64
    parameter); it is ``None`` before the first backward and adds up over backward calls.
    """

    slice: Slice
    parameter: nn.Parameter
    grad: Tensor | None = None

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

    def weight(self) -> Tensor:
        """The slice of the parameter itself: a view that shares its memory, without autograd."""
        data = self.parameter.detach()
        return data if self.slice.is_whole else data.narrow(self.dim, self.start, self.length)

    def accumulate(self, gradient: Tensor) -> None:
        """Add one gradient (the slice's shape, any floating dtype) in the accumulation dtype.

        Autograd gives gradients in the parameter's dtype. One that comes wider was made for this slice alone (a sum
        of contributions, or `passes.lower_triton`'s operator), and the first such becomes ``grad`` as it is.
        """
        dtype = torch.promote_types(self.parameter.dtype, torch.float32)
        if self.grad is not None:
            self.grad.add_(gradient)
        elif gradient.dtype == dtype != self.parameter.dtype:
            self.grad = gradient
        else:
            self.grad = gradient.to(dtype, copy=True)


def zero_gradients(slices: Iterable[ActiveSlice], set_to_none: bool) -> None:
    """Drop the gradients of these slices, or fill them with zeros in place."""
    for s in slices:
        if set_to_none:
            s.grad = None
        elif s.grad is not None:
            s.grad.zero_()


@dataclass
class ChunkSchedule:
    """Which chunk is active: ``interval`` optimizer steps each, every sweep visits every chunk once.

    ``order="random"`` draws a new permutation for each sweep from ``seed``, so that a run can be
    repeated and resumed: the state is three integers. ``cuts`` is the digest of the plan's chunks
    (`chunkft_fx.position.cuts_digest`), empty where there is no plan.
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
        """The schedule's position, for checkpoints, with what it means nothing without (see `chunkft_fx.position`)."""
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

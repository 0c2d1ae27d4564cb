"""Choices of the planner: what one is, how it fits, and what is asked of a model to tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from chunkft_fx.plan.plan import Chunk, Considered
from chunkft_fx.predict.fixed_memory import Terms
from chunkft_fx.predict.predictor import Head
from chunkft_fx.predict.step_memory import Moment
from chunkft_fx.predict.step_time import Saving, StepTimes, Work

# What a choice costs; compared in order.
Cost = tuple[float, ...]


class Predicts(Protocol):
    """What the search asks of a captured model (`predict.predictor.Predictor`)."""

    def uses(self) -> Sequence[frozenset[str]]: ...

    def head(self) -> Head: ...

    def peak(self, chunk: Chunk, saving: Saving) -> Moment: ...

    def sweep_peak(self, chunks: Sequence[Chunk], saving: Saving, enough: int = 0) -> Moment: ...

    def times(self, deepest: Chunk) -> StepTimes | None: ...

    def work(self, chunk: Chunk, times: StepTimes, states_nbytes: int) -> Work: ...


@dataclass(frozen=True)
class Choice:
    """One way to train: ``streamed`` counts the regions whose weights are fetched through ``depth`` buffers."""

    chunks: tuple[Chunk, ...]
    streamed: int
    depth: int
    saving: Saving

    @property
    def steps(self) -> tuple[tuple[Chunk, ...], Saving]:
        """What the steps of a sweep depend on."""
        return self.chunks, self.saving


@dataclass(frozen=True)
class Fit:
    """A choice with its terms of the peak, the label of the largest moment, its cost and (if known) its mean step."""

    choice: Choice
    terms: Terms
    peak_at: str
    cost: Cost
    step_us: float | None

    @property
    def nbytes(self) -> int:
        return sum(self.terms.values())

    def considered(self) -> Considered:
        """What a plan tells of this choice if it was not taken."""
        choice, saving = self.choice, self.choice.saving
        return Considered(
            chunks=len(choice.chunks),
            streamed=choice.streamed,
            depth=choice.depth,
            save_from=saving.save_from,
            offload_below=saving.offload_below,
            nbytes=self.nbytes,
            step_us=self.step_us,
            largest=max(self.terms, key=lambda name: self.terms[name]),
            head_split=saving.head_split,
        )


def key_of(choice: Choice) -> tuple[int, Saving]:
    """What the peaks of a choice's steps depend on; a number of chunks stands for one cut."""
    return len(choice.chunks), choice.saving

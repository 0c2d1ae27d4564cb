"""Holds what the search decides between: what a choice is, how it fits, and what is asked of a model to tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from chunkft_fx.plan.chunk import Chunk
from chunkft_fx.plan.policy import LinkUse, Policy, StepTimes
from chunkft_fx.plan.table import Considered
from chunkft_fx.predict.fixed_memory import Terms
from chunkft_fx.predict.predictor import Head
from chunkft_fx.predict.step_memory import Moment
from chunkft_fx.predict.step_time import Work

# What a choice costs; compared in order.
Cost = tuple[float, ...]


class Predicts(Protocol):
    """What the search asks of a captured model (`predict.predictor.Predictor`)."""

    def uses(self) -> Sequence[frozenset[str]]: ...

    def head(self) -> Head: ...

    def peak(self, chunk: Chunk, policy: Policy) -> Moment: ...

    def sweep_peak(self, chunks: Sequence[Chunk], policy: Policy, enough: int = 0) -> tuple[Chunk, Moment]: ...

    def times(self, deepest: Chunk) -> StepTimes | None: ...

    def offloaded_nbytes(self, below: int) -> int: ...

    def work(self, chunk: Chunk, times: StepTimes, states_nbytes: int) -> Work: ...

    def clocked(self, chunk: Chunk, policy: Policy) -> LinkUse | None: ...


@dataclass(frozen=True)
class Choice:
    """One way to train: ``streamed`` counts the regions whose weights are fetched.

    Which weights these are is put into the policy when the choice is taken (`planning.costs.ChoiceCosts.placed`).
    """

    chunks: tuple[Chunk, ...]
    streamed: int
    policy: Policy


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
        """Bytes of the predicted peak."""
        return sum(self.terms.values())

    def considered(self) -> Considered:
        """What a plan tells of this choice if it was not taken."""
        largest = max(self.terms, key=lambda name: self.terms[name])
        chunks, streamed = len(self.choice.chunks), self.choice.streamed
        return Considered(chunks, streamed, self.choice.policy, self.nbytes, self.step_us, largest)


def key_of(choice: Choice) -> tuple[int, Policy]:
    """What the peaks of a choice's steps depend on; a number of chunks stands for one cut."""
    return len(choice.chunks), choice.policy.of_steps

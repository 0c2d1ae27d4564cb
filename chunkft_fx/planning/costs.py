"""Predicts what a choice of the planner costs, and which bytes it needs whatever its steps do; each found once.

A choice costs the predicted time of a sweep (`predict.step_time.sweep_cost`). Where no times are known (on the CPU)
choices are compared by whether they offload, then by streamed regions, chunks, recomputing regions and the split.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from chunkft_fx.plan.chunk import Chunk
from chunkft_fx.plan.cuts import ParameterSpec, cut
from chunkft_fx.plan.policy import DEPTH, Policy, StepTimes
from chunkft_fx.plan.state_spec import ASSUMED, StateSpec, stage_capacity_nbytes
from chunkft_fx.planning.choice import Choice, Cost, Predicts
from chunkft_fx.planning.chunk_path import cheapest_chunks
from chunkft_fx.predict.fixed_memory import (
    Terms,
    chunk_terms,
    host_terms,
    piece_terms,
    rank_terms,
    resident_nbytes,
    weight_terms,
)
from chunkft_fx.predict.step_time import (
    BareSteps,
    SweepWork,
    Work,
    bare_steps,
    covering_step_us,
    step_us,
    streamed_regions,
    sweep_cost,
)

# The policy of a model that trains a chunk a step, before anything else is decided.
BASE = Policy()


class ChoiceCosts:
    """Costs (microseconds, where ``times`` are known) and fixed terms (bytes) of one model's choices.

    ``states`` is the bytes of all optimizer states that travel between host memory and the stage.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[ParameterSpec],
        predictor: Predicts,
        times: StepTimes | None,
        spec: StateSpec = ASSUMED,
    ) -> None:
        self.uses = predictor.uses()
        self.regions = len(self.uses)
        self.named, self.resident = dict(model.named_parameters()), resident_nbytes(model)
        self._given: frozenset[str] | None = None  # weights to stream, by default those of `placed` regions
        (whole,) = cut(parameters, 1)
        self.states = stage_capacity_nbytes(whole, self.named, spec) if spec.is_kept else 0
        self._spec = spec
        self._parameters, self._predictor, self._times, self._nbytes = parameters, predictor, times, whole.nbytes
        self._chunks: dict[int, tuple[Chunk, ...]] = {}
        self._weights: dict[tuple[int, int], Terms] = {}
        self._chunk_terms: dict[int, Terms] = {}
        self._pieces: dict[tuple[int, int], Terms] = {}
        self._placed: dict[int, tuple[int, ...]] = {}
        self._bare: dict[tuple[int, Policy], BareSteps] = {}
        self._works: dict[int, SweepWork] = {}
        self._costs: dict[tuple[int, int, Policy], tuple[Cost, float]] = {}

    def stream(self, names: frozenset[str]) -> int:
        """Have every choice stream exactly these weights; returns how many regions read one of them."""
        self._given = names
        return len(self.placed(0))

    def placed(self, streamed: int) -> tuple[int, ...]:
        """Which regions stream their weights when that many do."""
        if self._given is not None:
            return tuple(i for i, use in enumerate(self.uses) if use & self._given)
        if streamed not in self._placed:
            self._placed[streamed] = streamed_regions(self.regions, streamed, self._times, DEPTH)
        return self._placed[streamed]

    def streamed_names(self, streamed: int) -> frozenset[str]:
        """The weights that are streamed when that many regions do so."""
        if self._given is not None:
            return self._given
        return frozenset().union(*(self.uses[i] for i in self.placed(streamed)))

    def cut(self, count: int, times: StepTimes) -> tuple[Chunk, ...]:
        """The parameters as that many chunks, where the steps of a sweep take least."""
        if count not in self._chunks:
            bare = bare_steps(times, Policy(), frozenset(), DEPTH)
            self._chunks[count] = cheapest_chunks(self._parameters, count, lambda c: step_us(bare, self.work(c, times)))
        return self._chunks[count]

    def work(self, chunk: Chunk, times: StepTimes) -> Work:
        """What a chunk adds to a step."""
        return self._predictor.work(chunk, times, self.states * chunk.nbytes // self._nbytes)

    def cost(self, choice: Choice) -> tuple[Cost, float | None]:
        """What choices are compared by, and microseconds of the mean step where times are known."""
        policy, times = choice.policy, self._times
        if times is None:
            kept = policy.save_from, policy.head_split
            return (policy.offload_below > 0, choice.streamed, len(choice.chunks), *kept, policy.depth), None
        if policy.pieces:
            step = self._covering_us(choice, times)
            return (step, choice.streamed, 1, *policy.complexity), step
        count = len(choice.chunks)
        key = count, choice.streamed, policy
        found = self._costs.get(key)
        if found is None:
            steps = self._sweep(choice.chunks, times).steps_us(self._bare_steps(choice.streamed, policy, times))
            # equal costs are told apart by what is simpler
            cost = sweep_cost(steps), choice.streamed, count, *policy.complexity
            found = self._costs[key] = cost, float(steps.mean())
        return found

    def _sweep(self, chunks: tuple[Chunk, ...], times: StepTimes) -> SweepWork:
        if len(chunks) not in self._works:
            self._works[len(chunks)] = SweepWork.of([self.work(c, times) for c in chunks])
        return self._works[len(chunks)]

    def _bare_steps(self, streamed: int, policy: Policy, times: StepTimes) -> BareSteps:
        key = streamed, policy
        if key not in self._bare:
            self._bare[key] = bare_steps(times, policy, frozenset(self.placed(streamed)), policy.depth)
        return self._bare[key]

    def _covering_us(self, choice: Choice, times: StepTimes) -> float:
        """Microseconds of a step that covers all parameters."""
        policy, placed = choice.policy, frozenset(self.placed(choice.streamed))
        (whole,) = choice.chunks
        streamed = sum(self.named[n].numel() * self.named[n].itemsize for n in self.streamed_names(choice.streamed))
        work = self._predictor.work(whole, times, self.states + streamed)
        return covering_step_us(times, policy, placed, work)

    def host_terms(self, choice: Choice) -> Terms:
        """Bytes of host memory by kind, of a choice that has its streamed weights in its policy."""
        away = self._predictor.offloaded_nbytes(choice.policy.offload_below)
        terms = host_terms(self.named, choice.chunks, choice.policy, self._spec)
        return terms | ({"offloaded activations": away} if away else {})

    def fixed_terms(self, choice: Choice) -> Terms:
        """Bytes of weights and their ring, of gradients and staged states."""
        chunks, streamed, depth = choice.chunks, choice.streamed, choice.policy.depth
        where = streamed, depth
        if where not in self._weights:
            names = self.streamed_names(streamed)
            self._weights[where] = weight_terms(self.named, self.resident, self.uses, names, depth)
        if choice.policy.pieces:
            if where not in self._pieces:
                names = self.streamed_names(streamed)
                between = rank_terms(self.named, chunks, choice.policy)
                self._pieces[where] = piece_terms(self.named, chunks[0], choice.policy, self._spec, names) | between
            return self._weights[where] | self._pieces[where]
        if len(chunks) not in self._chunk_terms:
            between = rank_terms(self.named, chunks, choice.policy)
            self._chunk_terms[len(chunks)] = chunk_terms(self.named, chunks, self._spec) | between
        return self._weights[where] | self._chunk_terms[len(chunks)]

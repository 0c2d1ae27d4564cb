"""Planner: how many chunks, where they are cut, which weights are streamed, which regions keep activations.

The rule of this version: the fewest regions with streamed weights, none if that can be; then the fewest chunks whose
predicted peak fits, on a GPU more if `chunk_counts` says so; then, from the last region down, as many regions as fit
keep their activations, the others recompute them. The prediction adds weights and buffers, the active chunk's
gradients (those of earlier backwards too, as in gradient accumulation) and staged optimizer state, and the largest
moment of a step, which `step_memory` finds by replaying it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from chunkft_fx.blocks import block_paths, region_of_parameters
from chunkft_fx.budget import format_bytes
from chunkft_fx.chunk_counts import StepTimes, candidates, choose
from chunkft_fx.cuts import ParameterSpec, cut, max_chunks
from chunkft_fx.errors import BudgetInfeasible, NoTrainableParameters
from chunkft_fx.optim_state import stage_capacity_nbytes
from chunkft_fx.plan import Chunk, Plan
from chunkft_fx.streams import ring_buffer_nbytes

# The parts of a predicted peak by name, in bytes.
Terms = dict[str, int]

# More chunks than this save less than a thousandth of the states each; a 7B model has 1.7 million places to cut.
MOST_CHUNKS = 1024
# Buffers of the ring: one is read while the next is filled.
DEPTH = 2
# Steps of a sweep, beside the first, whose peak is predicted: their programs have to be made for it.
LOOKED_AT = 6


@dataclass(frozen=True)
class Options:
    """What the user asked of `chunkft_fx.compile`, checked and parsed."""

    budget_bytes: int
    chunks: int | str
    order: str
    interval: int
    seed: int
    return_logits: bool = False


def state_nbytes(dtype: torch.dtype) -> int:
    """Optimizer-state bytes per element of a parameter: two moments, and a master for low precision."""
    wide = torch.promote_types(dtype, torch.float32).itemsize
    return 2 * wide if dtype.itemsize >= 4 else 3 * wide


def parameter_specs(model: nn.Module) -> tuple[ParameterSpec, ...]:
    """The trainable parameters as the planner sees them, in ``named_parameters`` order (tied ones once)."""
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise NoTrainableParameters(
            "no parameter of this model has requires_grad=True; call model.requires_grad_(True) before compile"
        )
    regions = region_of_parameters([n for n, _ in trainable], block_paths(model.named_modules()))
    return tuple(
        ParameterSpec(name, tuple(p.shape), p.dtype.itemsize + state_nbytes(p.dtype), region)
        for (name, p), region in zip(trainable, regions, strict=True)
    )


def resident_nbytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def streamed_choice(uses: Sequence[frozenset[str]], count: int) -> frozenset[str]:
    """The weights of ``count`` of the regions, spread evenly so that fetches have compute to hide under."""
    spread = [i * len(uses) // count for i in range(count)]
    return frozenset().union(*(uses[i] for i in spread))


def ring_nbytes(model: nn.Module, uses: Sequence[frozenset[str]], streamed: frozenset[str]) -> int:
    """Bytes of the buffers that streamed weights pass through, each as large as the largest region's."""
    parameters = dict(model.named_parameters())
    return DEPTH * ring_buffer_nbytes([[parameters[n] for n in use & streamed] for use in uses])


def fixed_terms(
    model: nn.Module,
    chunks: Sequence[Chunk],
    uses: Sequence[frozenset[str]] = (),
    streamed: frozenset[str] = frozenset(),
) -> Terms:
    """The terms that need no batch: weights, and gradients and states of the largest chunk.

    ``uses`` says which parameters each region reads, ``streamed`` which of them stay in host memory.
    """
    parameters = dict(model.named_parameters())
    dtypes = {name: p.dtype for name, p in parameters.items()}
    sizes = {name: p.numel() for name, p in parameters.items()}

    def total(chunk: Chunk, per_element: Callable[[torch.dtype], int]) -> int:
        return sum(sizes[s.name] * s.length // s.size * per_element(dtypes[s.name]) for s in chunk.slices)

    away = sum(sizes[n] * dtypes[n].itemsize for n in streamed)
    ring = {"ring of streamed weights": ring_nbytes(model, uses, streamed)} if streamed else {}
    return {
        "weights and buffers": resident_nbytes(model) - away,
        **ring,
        "optimizer state of the active chunk": max(stage_capacity_nbytes(c, parameters) for c in chunks),
        "gradients of the active chunk": max(
            total(c, lambda d: torch.promote_types(d, torch.float32).itemsize) for c in chunks
        ),
    }


def first_plan(model: nn.Module, options: Options) -> Plan | None:
    """The plan as far as it can be made before a batch is seen; None when ``chunks="auto"`` needs one.

    Raises `BudgetInfeasible` when the budget cannot even hold weights and one chunk's states.
    """
    parameters = parameter_specs(model)
    finest = _finest(parameters) if options.chunks == "auto" else options.chunks
    chunks = cut(parameters, int(finest))
    uses = parts_of(model)
    resident, streamed = fixed_terms(model, chunks), fixed_terms(model, chunks, uses, frozenset().union(*uses))
    least = min(resident, streamed, key=lambda terms: sum(terms.values()))
    _require(options.budget_bytes, least, len(chunks), "before any activation")
    if options.chunks == "auto":
        return None
    return Plan(options.budget_bytes, chunks, options.order, options.interval, options.seed)


class Predictor(Protocol):
    """What planning asks of a captured model."""

    def uses(self) -> Sequence[frozenset[str]]:
        """For each region the names of the parameters that it reads."""
        ...

    def activation_terms(self, chunk: Chunk, save_from: int) -> Terms:
        """The largest moment of a step on a chunk whose regions below ``save_from`` recompute, beyond what is fixed."""
        ...

    def rule_of_counts(self, finest: Chunk, state_nbytes: int) -> StepTimes | None:
        """Predicted times that the number of chunks depends on; None where copies of states cost nothing."""
        ...


def plan_for_batch(model: nn.Module, options: Options, known: Plan | None, predictor: Predictor, batch: str) -> Plan:
    """Complete a plan for a batch: streamed weights and number of chunks if still open, then the saving policy.

    Raises `BudgetInfeasible`, with the smallest budget that is enough, when nothing fits.
    """
    return _Planning(model, options, known, predictor, batch).plan()


class _Planning:
    """One decision: candidates are tried against the predicted peak of the steps that they lead to."""

    def __init__(
        self, model: nn.Module, options: Options, known: Plan | None, predictor: Predictor, batch: str
    ) -> None:
        self.model, self.options, self.known, self.predictor, self.batch = model, options, known, predictor, batch
        self.parameters = parameter_specs(model)
        self.uses = predictor.uses()
        self.streamed: frozenset[str] = frozenset()
        self._terms: dict[tuple[Chunk, int], Terms] = {}

    def plan(self) -> Plan:
        finest = self.known.chunks if self.known is not None else cut(self.parameters, _finest(self.parameters))
        if self.known is not None and self.known.batch:
            self.streamed = frozenset(self.known.streamed)
        elif not self.fits(finest, 0):  # what a fit with every weight resident needs no look at the least step
            floor = sum(self.largest_step(finest, len(self.uses)).values())
            self.streamed = _fewest_streamed(self.model, self.uses, finest, self.options.budget_bytes - floor)
        chunks = self.known.chunks if self.known is not None else self.counted(finest)
        border = self.border(chunks)
        final = self.terms(chunks, border)
        options = self.options
        plan = self.known or Plan(options.budget_bytes, chunks, options.order, options.interval, options.seed)
        return replace(
            plan,
            streamed=tuple(sorted(self.streamed)),
            depth=DEPTH,
            save_from=(border,) * len(chunks),
            predicted_peak_bytes=sum(final.values()),
            terms=tuple(sorted(final.items(), key=lambda item: -item[1])),
            batch=self.batch,
        )

    def step(self, chunk: Chunk, save_from: int) -> Terms:
        """The step terms of one chunk."""
        key = chunk, save_from
        if key not in self._terms:
            self._terms[key] = self.predictor.activation_terms(chunk, save_from)
        return self._terms[key]

    def terms(self, chunks: tuple[Chunk, ...], save_from: int) -> Terms:
        """The terms of the peak: fixed ones, and the largest step of chunks spread over the sweep.

        A chunk's backward is the deeper the earlier the chunk; the others differ in what gradients they make.
        """
        return self.fixed(chunks) | self.largest_step(chunks, save_from)

    def largest_step(self, chunks: tuple[Chunk, ...], save_from: int) -> Terms:
        looked = {k * (len(chunks) - 1) // LOOKED_AT for k in range(LOOKED_AT + 1)}
        steps = [self.step(chunks[k], save_from) for k in sorted(looked)]
        return max(steps, key=lambda terms: sum(terms.values()))

    def fixed(self, chunks: tuple[Chunk, ...]) -> Terms:
        return fixed_terms(self.model, chunks, self.uses, self.streamed)

    def fits(self, chunks: tuple[Chunk, ...], save_from: int) -> bool:
        budget = self.options.budget_bytes
        if sum(self.fixed(chunks).values()) + sum(self.step(chunks[0], save_from).values()) > budget:
            return False  # known with one program
        return sum(self.terms(chunks, save_from).values()) <= budget

    def border(self, chunks: tuple[Chunk, ...]) -> int:
        """The first region that can save; raises `BudgetInfeasible` when not even recomputing all of them fits."""
        if self.fits(chunks, 0):
            return 0
        low, high = 1, len(self.uses)
        if not self.fits(chunks, high):
            _require(self.options.budget_bytes, self.terms(chunks, high), len(chunks), f"for {self.batch}")
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(chunks, middle) else (middle + 1, high)
        return low

    def counted(self, finest: tuple[Chunk, ...]) -> tuple[Chunk, ...]:
        """The chunks when their number is open: at least as many as fit and hide their states; see `chunk_counts`."""
        most, depth = _finest(self.parameters), len(self.uses)
        fewest = _fewest(self.parameters, lambda c: self.fits(c, depth))
        states = sum(c.nbytes for c in finest)
        times = self.predictor.rule_of_counts(finest[0], states)
        if times is None:
            return fewest
        counts = candidates(times, len(fewest), most)
        found = [(n, cut(self.parameters, n)) for n in counts]
        borders = [self.border(c) if self.fits(c, depth) else None for _, c in found]
        chosen = choose(times, [(n, b) for (n, _), b in zip(found, borders, strict=True) if b is not None])
        return next((c for n, c in found if n == chosen), fewest)


def parts_of(model: nn.Module) -> tuple[frozenset[str], ...]:
    """The parameters of each part of a model, as far as it is known before the model is traced."""
    names = [n for n, _ in model.named_parameters()]
    numbers = region_of_parameters(names, block_paths(model.named_modules()))
    parts = [frozenset(n for n, i in zip(names, numbers, strict=True) if i == part) for part in range(max(numbers) + 1)]
    return tuple(parts)


def _fewest_streamed(
    model: nn.Module, uses: Sequence[frozenset[str]], chunks: Sequence[Chunk], room: int
) -> frozenset[str]:
    """The streamed weights of the fewest regions with which the fixed terms fit, else of the least need."""
    choices = [streamed_choice(uses, count) for count in range(len(uses) + 1)]
    needs = [sum(fixed_terms(model, chunks, uses, c).values()) for c in choices]
    fitting = [c for c, need in zip(choices, needs, strict=True) if need <= room]
    return fitting[0] if fitting else choices[needs.index(min(needs))]


def _finest(parameters: Sequence[ParameterSpec]) -> int:
    """The largest number of chunks that ``"auto"`` considers."""
    return min(max_chunks(parameters), MOST_CHUNKS)


def _fewest(parameters: Sequence[ParameterSpec], fits: Callable[[tuple[Chunk, ...]], bool]) -> tuple[Chunk, ...]:
    """The cut with the fewest chunks that fits, or the finest one when none does."""
    low, high = 1, _finest(parameters)
    count = 1
    while count < high and not fits(cut(parameters, count)):
        low, count = count + 1, count * 2
    high = min(count, high)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(cut(parameters, middle)) else (middle + 1, high)
    return cut(parameters, low)


def _require(budget: int, terms: Terms, chunks: int, when: str) -> None:
    needed = sum(terms.values())
    if needed <= budget:
        return
    largest = sorted(terms.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in largest)
    raise BudgetInfeasible(
        f"budget {format_bytes(budget)} is too small {when}: with {chunks} chunk(s) the step needs "
        f"{format_bytes(needed)} ({listed}); raise the budget to at least {needed} bytes, use more chunks, "
        "or a smaller batch or sequence",
        needed,
        dict(largest),
    )

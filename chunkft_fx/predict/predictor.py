"""Predicts for the planner the largest moment of a step, and how long its parts take.

Bytes come from replaying the very programs that would run (`predict.step_memory`), microseconds from the cost model and
the measured rates of the machine. On the CPU states are updated where they are and host memory is device memory, so
plans there are decided by memory alone and no times are asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chunkft_fx.capture.outline import Region
from chunkft_fx.graph.sizes import AS_TRACED, Sizes
from chunkft_fx.head.memory import useful_splits
from chunkft_fx.head.operators import is_head
from chunkft_fx.machine.known_rates import known_rates
from chunkft_fx.machine.overhead import overhead
from chunkft_fx.machine.rates import ALONE, RankLink, Rates
from chunkft_fx.plan.chunk import Chunk
from chunkft_fx.plan.pieces import weights_nbytes
from chunkft_fx.plan.policy import LinkUse, Policy, StepTimes
from chunkft_fx.plan.state_spec import ASSUMED, StateSpec
from chunkft_fx.predict.chunk_kinds import Kinds, sweep_peak
from chunkft_fx.predict.region.time import direction_us, transfer_us
from chunkft_fx.predict.step_clock import Span, clocked_step, spans
from chunkft_fx.predict.step_memory import Moment, moment_label, most_workspace, step_timeline
from chunkft_fx.predict.step_time import Work
from chunkft_fx.program.programs import Programs
from chunkft_fx.program.variants import Variant

# The term of what is there before a step, beside weights and what training keeps.
BATCH = "batch and constants"
# Bytes that pass to add an element of a bfloat16 gradient to the float32 sum of those of other micro-batches.
SUM_NBYTES = 2 + 4 + 4


@dataclass(frozen=True)
class Head:
    """The splits that make blocks of a chunked head smaller, and the labels of the moments of a step that are its."""

    splits: tuple[int, ...] = (1,)
    moments: frozenset[str] = frozenset()


class Predictor:
    """Predictions of what the programs of one capture would do; everything is found once.

    ``absent`` names the tangents that backward is expected not to get. ``known`` are rates of a GPU elsewhere, by
    default the measured ones of the GPU here, and none on the CPU. ``sizes`` are those of the batch, by default as it
    was traced, ``given`` the bytes by name that are there beside what a step makes, and ``spec`` describes the
    optimizer. A step runs ``micro_batches`` such batches, on each of the ranks behind ``link``.
    """

    def __init__(
        self,
        programs: Programs,
        absent: frozenset[str] = frozenset(),
        known: Rates | None = None,
        sizes: Sizes = AS_TRACED,
        given: Mapping[str, int] | None = None,
        spec: StateSpec = ASSUMED,
        micro_batches: int = 1,
        link: RankLink = ALONE,
    ) -> None:
        self._link = link
        self.programs, self._absent, self._known, self._batch = programs, absent, known, sizes
        self._given, self._spec, self._micro_batches = given or {}, spec, micro_batches
        self._peaks: dict[tuple[Chunk, Policy], Moment] = {}
        self.known_times: StepTimes | None = None  # once they were asked for
        self._nodes = {node.name: node for node in programs.capture.graph.nodes}
        self._sizes = {name: p.numel() for name, p in programs.parameters.items()}
        self._regions = programs.uses
        self._region_sizes = [sum(self._sizes[name] for name in use) for use in self._regions]
        self._kinds = Kinds(programs.outline.regions, programs.capture.parameters)
        self._used_in = {name: [i for i, use in enumerate(self._regions) if name in use] for name in self._sizes}

    @functools.cached_property
    def rates(self) -> Rates | None:
        """The rates that times are predicted with."""
        device = self.programs.device
        return known_rates(device) if self._known is None and device.type == "cuda" else self._known

    @property
    def asked(self) -> tuple[Any, ...]:
        """What predictions depend on beside the programs, as plain values whose text says all of them."""
        known = sorted(self._absent), self.rates, self._batch, sorted(self._given.items())
        return *known, self._spec, self._micro_batches, self._link

    def uses(self) -> Sequence[frozenset[str]]:
        """For each region the names of the parameters that it reads."""
        return self._regions

    def head(self) -> Head:
        """What the search may do about the blocks of a chunked head."""
        regions = [r for r in self.programs.outline.regions if r.template.has_head]
        splits: set[int] = {1}
        for node in (n for r in regions for n in r.template.graph.graph.nodes if is_head(n)):
            splits |= {*useful_splits(node, self._batch)}
        labels = frozenset(moment_label(r, is_backward) for r in regions for is_backward in (False, True))
        return Head(tuple(sorted(splits)), labels)

    def peak(self, chunk: Chunk, policy: Policy) -> Moment:
        """The largest moment of a step on a chunk, in bytes beyond what `predict.fixed_memory` counts."""
        key = chunk, policy.of_steps
        if key not in self._peaks:
            planned = self.programs.planned(chunk, self._absent, policy)
            moments = step_timeline(planned, self.programs.backend, sizes=self._batch)
            largest = max(moments, key=lambda m: m.nbytes)
            device = self.programs.device if self._known is None else torch.device("cuda")
            besides = dict(self._given) | overhead(device, largest.nbytes, most_workspace(moments))
            self._peaks[key] = Moment(largest.label, largest.terms | besides)
        return self._peaks[key]

    def sweep_peak(self, chunks: Sequence[Chunk], policy: Policy, enough: int = 0) -> tuple[Chunk, Moment]:
        """The chunk of a sweep whose step has the largest moment, and this; the first unless another needs more.

        Where that fits into ``enough`` bytes it can be a moment that no step exceeds, which is found sooner.
        """
        can_join = not self.programs.specializer.is_asked
        return sweep_peak(self._kinds, chunks, policy, lambda chunk: self.peak(chunk, policy), enough, can_join)

    def times(self, deepest: Chunk) -> StepTimes | None:
        """Predicted times of the regions, by a step whose backward reaches all; None where no rates are known."""
        if self.rates is None:
            return None
        if self.known_times is None:
            self.known_times = self._predicted(deepest, self.rates)
        return self.known_times

    def clocked(self, chunk: Chunk, policy: Policy) -> LinkUse | None:
        """What a step that covers all parameters takes, by its program; None where no rates are known."""
        times = self.times(chunk)
        if times is None:
            return None
        program = self.programs.planned(chunk, self._absent, policy).program
        return clocked_step(program, policy, times, self.programs.parameters, self._batch)

    def spans(self, chunk: Chunk, policy: Policy) -> tuple[Span, ...]:
        """All that a step that covers all parameters does, and when; empty where no rates are known."""
        times = self.times(chunk)
        if times is None:
            return ()
        program = self.programs.planned(chunk, self._absent, policy).program
        return spans(program, policy, times, self.programs.parameters, self._batch)

    def work(self, chunk: Chunk, times: StepTimes, states_nbytes: int) -> Work:
        """What a chunk, with so many bytes of states on the device, adds to a step."""
        lowest = min((i for s in chunk.slices for i in self._used_in[s.name]), default=len(self._regions))
        gradients = sum(us * share for us, share in zip(times.gradients_us, self._shares(chunk), strict=True))
        ranks = 1 if self._spec.is_whole else self._link.ranks
        update = chunk.numel * times.update_us_per_element / ranks
        update += weights_nbytes(chunk, self.programs.parameters) * times.ranks_us_per_byte
        return Work(lowest, gradients + update, states_nbytes * times.state_us_per_byte / ranks)

    def _shares(self, chunk: Chunk) -> list[float]:
        """For each region the share of its weights' elements that a chunk has."""
        shares = [0.0] * len(self._regions)
        for s in chunk.slices:
            for i in self._used_in[s.name]:
                shares[i] += self._sizes[s.name] * s.length / s.size / self._region_sizes[i]
        return shares

    def offloaded_nbytes(self, below: int) -> int:
        """Bytes that the regions below this one keep in host memory between forward and backward, if they offload."""
        return sum(self._kept(r) for r in self.programs.outline.regions[:below])

    def _predicted(self, deepest: Chunk, known: Rates) -> StepTimes:

        def us(variant: Variant, is_backward: bool) -> float:
            return direction_us(variant, is_backward, known, self._batch)

        last = len(self._regions)
        saving, again = self._variants(deepest, Policy()), self._variants(deepest, Policy(save_from=last))
        forward = tuple(us(v, False) for v in saving)
        reaching = tuple(us(v, True) for v in saving)
        recomputing = tuple(us(v, True) for v in again)
        whole = sum(forward) + sum(reaching)
        # a product with a weight has a gradient of the same size; those of this very chunk are in its backward
        own = (us * share for us, share in zip(forward, self._shares(deepest), strict=True))
        backward = tuple(max(us - gradients, 0.0) for us, gradients in zip(reaching, own, strict=True))
        split_us = []
        for split in self.head().splits:
            variants = self._variants(deepest, Policy(head_split=split))
            each = sum(us(v, is_backward) for v in variants for is_backward in (False, True))
            split_us.append((split, max(each - whole, 0.0)))
        parameters = self.programs.parameters
        gradients = sum(parameters[s.name].nbytes // s.size * s.length for s in deepest.slices)
        weights = [sum(parameters[n].numel() * parameters[n].itemsize for n in use) for use in self._regions]
        sums = (self._micro_batches - 1) * SUM_NBYTES
        one = StepTimes(
            forward_us=forward,
            backward_us=backward,
            recompute_us=tuple(max(a - b, 0.0) for a, b in zip(recomputing, reaching, strict=True)),
            gradients_us=forward,
            fetch_us=tuple(transfer_us(n, known, "host_to_device") for n in weights),
            offload_us=tuple(
                transfer_us(self._kept(r), known, "device_to_host") for r in self.programs.outline.regions
            ),
            state_us_per_byte=transfer_us(1, known, "both_ways"),
            update_us_per_element=(self._spec.update_nbytes + sums) / known.memory_nbytes_per_s * 1e6,
            split_us=tuple(split_us),
            leave_us=transfer_us(gradients, known, "device_to_host"),
            return_us=transfer_us(gradients, known, "host_to_device"),
            slowed_by_copies=known.slowed_by_copies,
            ranks_us_per_byte=self._link.us_per_byte,
        )
        return one.times(self._micro_batches)

    def _variants(self, chunk: Chunk, policy: Policy) -> Sequence[Variant]:
        return self.programs.planned(chunk, self._absent, policy).program.variants

    def _kept(self, region: Region) -> int:
        """Bytes that a recomputing region keeps: what it reads that regions before it made."""
        made = {name for r in self.programs.outline.regions for name in r.forward}
        values = [self._nodes[name].meta["val"] for name in region.primals if name in made]
        return sum(self._batch.nbytes(v) for v in values)

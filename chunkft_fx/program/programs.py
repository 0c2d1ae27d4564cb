"""Writes the programs of one capture: which one a step on a chunk runs, and which one it would run.

Each is made from what is asked once, when it is first asked for. `runtime.session` runs them.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from chunkft_fx.capture.capture import Capture
from chunkft_fx.capture.outline import Outline
from chunkft_fx.graph.region import Pass, ProgramPass
from chunkft_fx.kernels.weight_gradient import Choose
from chunkft_fx.plan.chunk import Chunk, Slice
from chunkft_fx.plan.policy import Policy
from chunkft_fx.program import run_passes
from chunkft_fx.program.instructions import Executable, assemble, exchanged
from chunkft_fx.program.program import Program, ProgramSpec, build, choose_variants, own_inputs
from chunkft_fx.program.variants import Specializer, Variant


class Programs:
    """All programs of one capture on ``device``, lowered by ``backend``.

    ``parameters`` are all of the model by name, as tensors that need no memory. ``choose`` decides who computes a
    weight gradient's slice. ``passes`` and ``program_passes`` are the user's own, over region graphs and over programs.
    ``last`` is the executable that was asked for last.
    """

    def __init__(
        self,
        capture: Capture,
        outline: Outline,
        parameters: Mapping[str, Tensor],
        backend: str,
        device: torch.device,
        choose: Choose | None = None,
        passes: Sequence[Pass] = (),
        program_passes: Sequence[ProgramPass] = (),
    ) -> None:
        self.capture, self.outline, self.parameters = capture, outline, parameters
        self.backend, self.device = backend, device
        self.specializer = Specializer(choose, passes)
        self.last: Executable | None = None
        self._last: tuple[ProgramSpec, list[Variant]] | None = None
        # positions of the inputs, other than parameters, that get a gradient
        self.inputs = tuple(
            i for i, p in enumerate(capture.primals) if p in capture.gradients and p not in capture.parameters
        )
        self._passes = tuple(program_passes)
        self._executables: dict[Hashable, Executable] = {}
        self._planned: dict[Hashable, Executable] = {}  # programs that predictions were made from

    @functools.cached_property
    def uses(self) -> list[frozenset[str]]:
        """For each region the names of the parameters that it reads."""
        names = self.capture.parameters
        return [frozenset(names[p] for p in region.primals if p in names) for region in self.outline.regions]

    def executable(self, slices: tuple[Slice, ...], absent: frozenset[str], policy: Policy) -> Executable:
        """The program of the chunk of these slices, assembled; ``policy.streamed`` are the weights to fetch.

        ``absent`` names the tangents that backward will not get.
        """
        key = slices, absent, policy
        if key not in self._executables:
            spec = replace(self._spec(slices, absent, policy), state_nbytes=self._state_nbytes(slices, policy))
            variants = choose_variants(self.capture, self.outline, self.specializer, spec)
            self._executables[key] = self._written(spec, variants)
            self._last = spec, variants
        self.last = self._executables[key]
        return self.last

    def variants(self, slices: tuple[Slice, ...], absent: frozenset[str], policy: Policy) -> list[Variant]:
        """The variants that the program of the chunk of these slices calls, in the order of the regions."""
        return choose_variants(self.capture, self.outline, self.specializer, self._spec(slices, absent, policy))

    def rewritten(self, hook: run_passes.Hook[fx.GraphModule]) -> Program:
        """The program that was written last, written again with a hook between its passes; it must exist."""
        assert self._last is not None, "a program was asked for before"
        spec, variants = self._last
        return build(self.capture, self.outline, spec, variants, hook)

    def evaluation(self, policy: Policy) -> Executable:
        """The program without gradients."""
        return self.executable((), frozenset(), policy)

    def planned(self, chunk: Chunk, absent: frozenset[str], policy: Policy) -> Executable:
        """What would run for a chunk if all weights were resident and its states came all at once.

        Programs that would look the same are written once, for the first chunk asked for: the result then has the
        other's graph and starts, but the variants of this one (`instructions.exchanged`).
        """
        spec = self._spec(chunk.slices, absent, policy.of_steps)
        variants = choose_variants(self.capture, self.outline, self.specializer, spec)
        # a split of the head shows in its region's variant
        looks = absent, replace(spec.policy, head_split=1), tuple(v.interface for v in variants)
        if looks not in self._planned:
            self._planned[looks] = self._written(spec, variants)
        return exchanged(self._planned[looks], variants)

    def _state_nbytes(self, slices: Sequence[Slice], policy: Policy) -> int:
        if not policy.states.is_kept:
            return 0
        whole = sum(policy.states.slice_nbytes(self.parameters[s.name], s.length) for s in slices)
        return whole if policy.states.is_whole else whole // policy.ranks

    def _spec(self, slices: tuple[Slice, ...], absent: frozenset[str], policy: Policy) -> ProgramSpec:
        inputs = frozenset(self.capture.primals[i] for i in self.inputs) if slices else frozenset()
        by_name = {s.name: s for s in slices}
        return ProgramSpec(by_name, absent, inputs, policy, self.device, passes=self._passes)

    def _written(self, spec: ProgramSpec, variants: list[Variant]) -> Executable:
        program = build(self.capture, self.outline, spec, variants)
        capture, repeats = self.capture, spec.policy.micro_batches - 1
        inputs = len(capture.primals) + repeats * len(own_inputs(capture)) + len(capture.constants)
        executable = assemble(program, inputs)
        program.forget()
        return executable

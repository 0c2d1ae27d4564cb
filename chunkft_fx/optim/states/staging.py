"""Copies an optimizer's states: host memory keeps those of all parameters, the stage has those of the active slices."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from chunkft_fx.copies.states.ring import PieceRing, make_ring
from chunkft_fx.copies.states.stage import FreshStage, Stage, make_stage
from chunkft_fx.gradients.slices import ActiveSlice
from chunkft_fx.graph.layout import size_along
from chunkft_fx.kernels.masters import Ties, ties
from chunkft_fx.module.training import Training
from chunkft_fx.optim.checkpoint import fill_masters
from chunkft_fx.optim.saved_states import SavedState, take
from chunkft_fx.optim.states.host_states import HostStates, require_room
from chunkft_fx.optim.states.step_counts import Counts, counted, uniform
from chunkft_fx.optim.update import StagedSlice
from chunkft_fx.plan.chunk import ALL, Slice
from chunkft_fx.plan.cuts import cut_dim
from chunkft_fx.plan.pieces import piece_nbytes
from chunkft_fx.plan.state_spec import MASTER, StateLayout, StateSpec, stage_capacity_nbytes
from chunkft_fx.ranks.ranks import Ranks


class Watch(Protocol):
    """Who reads states in host memory while training goes on, and must be told before they change there."""

    def before_step(self) -> None:
        """Called before a step changes anything; what it raises is the step's error."""

    def before_change(self, slices: Sequence[Slice]) -> None:
        """Called before the states of these slices change in host memory; raises nothing."""

    def finish(self) -> None:
        """Return when no states are read any more."""


class StagedStates:
    """The states of one optimizer; ``known`` is its dictionary of them, by parameter, which is filled here.

    ``host_budget`` bounds the bytes that host memory keeps (None: what is available), ``smaller`` are the options with
    which states would take less. Raises `HostMemoryExceeded` if there is no room for the states of ``parameters``.
    """

    def __init__(
        self,
        model: Training,
        spec: StateSpec,
        known: MutableMapping[Any, Any],
        parameters: Sequence[Tensor],
        host_budget: int | None,
        smaller: Sequence[str],
    ) -> None:
        self._model, self._spec, self._known = model, spec, known
        # what updates parameters as a whole is kept, and done, by each rank
        self.share = ALL if spec.is_whole else model.ranks.share
        self._host_budget, self._smaller = host_budget, smaller
        self.stage = self._idle_stage()
        self._staged: list[Slice] = []
        self._ties: dict[Tensor, Ties] = {}  # of loaded masters, until the first use after loading
        self._modified = False  # the stage holds newer values than host memory
        self._kept = [self.places(parameters)]
        self._ring: PieceRing | None = None
        self.travelling: frozenset[str] = frozenset()  # weights that have room in the ring beside their states
        self._depth = 0  # buffers of the ring
        self.watch: Watch | None = None

    def ring(self) -> PieceRing:
        """The ring that the pieces of the model's plan pass through, on the device where it runs."""
        device = self._model.compute_device
        if self._ring is None or self._ring.device != device:
            pieces, parameters = self._model.plan.policy.pieces, dict(self._model.named_parameters())
            self.travelling = self._away()
            self._depth = pieces.depth
            self._ring = None  # free before taking another
            nbytes = piece_nbytes(pieces, parameters, self._spec, self.travelling, self.share)
            self._ring = make_ring(self._model.engines.incoming, pieces.depth, nbytes)
        return self._ring

    def places(self, parameters: Sequence[Tensor]) -> HostStates:
        """Places in host memory for these parameters' states; `HostMemoryExceeded` if there is no room for them."""
        states = HostStates(parameters, self._spec, self.share)
        if self._spec.is_kept:
            require_room(states, self._is_pinned(), self._host_budget, self._smaller)
        return states

    @property
    def untaken_nbytes(self) -> int:
        """Bytes of host memory that are still to be taken for states that it keeps."""
        return sum(s.untaken_nbytes(self._is_pinned()) for s in self._kept) if self._spec.is_kept else 0

    def holds(self, parameter: Tensor) -> bool:
        """Whether this parameter's states have a place."""
        return any(states.holds(parameter) for states in self._kept)

    def own(self, s: ActiveSlice) -> ActiveSlice | None:
        """The part of a slice whose states this rank keeps; None if it keeps none of them."""
        if self.share.is_all:
            return s
        part = self.share.within(s.slice)
        return None if part is None else ActiveSlice(part, s.parameter)

    def counts(self, s: ActiveSlice) -> Counts:
        """How often each part of a slice's parameter was updated."""
        return cast(Counts, self._known[s.parameter]["slice_steps"])

    def layouts(self, parameter: Tensor) -> Mapping[str, StateLayout]:
        """A parameter's state tensors by name."""
        return self._spec.layouts(parameter)

    def count(self, entry: StagedSlice) -> None:
        """Count an update of a slice, with the new numbers of its runs."""
        state, s = self._known[entry.parameter], entry.slice
        state["slice_steps"] = counted(state["slice_steps"], s.start, s.length, entry.after)

    def spread(self, updated: Sequence[ActiveSlice]) -> None:
        """Give all ranks the weights that each of them has updated of these slices."""
        if not self.share.is_all:
            self._model.ranks.spread([(s.slice, s.weight()) for s in updated], self._model.compute_device)

    def announce(self, active: Sequence[ActiveSlice]) -> None:
        """Have the states of these slices brought to where the model runs, unless they are there.

        They come as the programs of the next step let them, the rest when the update asks for them. Of several ranks
        each has those of its share.
        """
        active = [own for s in active if (own := self.own(s)) is not None]
        slices = [s.slice for s in active]
        if slices == self._staged and self._model.compute_device == self.stage.device:
            return
        self.write_back()
        self._staged = []
        self.take_stage()
        if not self._spec.is_kept:
            self._known.clear()
        self.stage.announce([host for s in active for host in self.host(s)])
        self._staged = slices

    def staged(self, active: Sequence[ActiveSlice]) -> dict[str, dict[str, Tensor]]:
        """The staged tensors of the slices that were announced, by parameter name and state name."""
        self.settle_ties()
        rest = iter(self.stage.tensors())
        present = [s for s in active if self.own(s) is not None]
        return {s.name: {key: next(rest) for key in self._spec.layouts(s.parameter)} for s in present}

    def will_change(self) -> None:
        """From now on the stage holds newer values than host memory; on the CPU it is host memory."""
        self.before_step()
        if self.stage.device.type == "cpu":
            self.before_change(self._staged)
        self._modified = True

    def before_step(self) -> None:
        """Tell who reads states that a step is about to change something."""
        if self.watch is not None:
            self.watch.before_step()

    def before_change(self, slices: Sequence[Slice]) -> None:
        """Tell who reads states that those of these slices are about to change in host memory."""
        if self.watch is not None and self._spec.is_kept:
            self.watch.before_change(slices)

    def write_back(self) -> None:
        """Begin to copy what has changed on the stage to host memory."""
        if self._modified:
            self.before_change(self._staged)
            self.stage.write_back()
            self._modified = False

    def take_stage(self) -> None:
        """Take memory for the states of the largest chunk where the model runs, unless it is taken."""
        device = self._model.compute_device
        if self._model.plan.policy.pieces:
            now = self._away(), self._model.plan.policy.pieces.depth
            if self._ring is not None and now != (self.travelling, self._depth):
                self._ring.synchronize()
                self._ring = None  # another plan keeps other weights in host memory, or has another number of buffers
            self.ring()
            return
        if device == self.stage.device:
            return
        self.write_back()
        self.stage.synchronize()
        self.stage, self._staged = self._make_stage(device), []

    def _away(self) -> frozenset[str]:
        """The weights that pass through the ring; among several ranks the update itself writes those in host memory."""
        return self._model.residency.away() if self.share.is_all else frozenset()

    def drop_stage(self) -> None:
        """Give the stage's memory back; it is taken anew, for the chunks that there are then."""
        self.write_back()
        self.synchronize()
        self.stage, self._staged, self._ring = self._idle_stage(), [], None

    def synchronize(self) -> None:
        """Wait until host memory is up to date with every copy begun."""
        self.stage.synchronize()
        if self._ring is not None:
            self._ring.synchronize()

    def settle(self) -> None:
        """Bring host memory up to date, masters of slices that were never active included."""
        if self.watch is not None:
            self.watch.finish()
        self.write_back()
        self.synchronize()
        self.settle_ties()
        fill_masters(self._known, self.share)

    @property
    def ranks(self) -> Ranks:
        """Who else has a share."""
        return self._model.ranks

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Have states of these parameters, those that there are not yet as they are before the first update."""
        if self.share.is_all:
            return  # they are updated as wholes, so each has its states
        for parameter in parameters:
            self._state_of(parameter)
        fill_masters(self._known, self.share)

    def begin_anew(self, parameters: Sequence[Tensor]) -> None:
        """Forget all states and have places for those of these parameters, of which the stage must hold none."""
        if self.watch is not None:
            self.watch.finish()
        self._known.clear()
        self._ties.clear()
        self._kept = []
        self._kept = [self.places(parameters)]

    def replace(self, saved: Mapping[Tensor, SavedState], parameters: Sequence[Tensor]) -> None:
        """Take saved states in place of all that there are; those that are not kept begin anew."""
        self.synchronize()
        self.stage = self._idle_stage()  # lets go of the old states, of which there must not be two
        self._staged, self._modified = [], False
        self.begin_anew(parameters)
        for parameter, states in saved.items() if self._spec.is_kept else ():
            take(states, self._state_of(parameter), cut_dim(parameter.shape), self._spec, self.share)
            if MASTER in states.tensors and parameter.dtype == torch.bfloat16:
                self._ties[parameter] = ties(states.tensors[MASTER].float())

    def rename(self, before: Mapping[str, Tensor], now: Mapping[str, nn.Parameter], more: HostStates | None) -> None:
        """Let the states of each parameter go on as those of the one that has its name now; ``more`` are new places."""
        if more is not None:
            self._kept.append(more)
        for name, old in before.items():
            new = now.get(name)
            if new is None:
                continue
            if new is not old and old in self._known:
                self._known[new] = self._known.pop(old)
            if new is not old and old in self._ties:
                self._ties[new] = self._ties.pop(old)
            for states in self._kept:
                states.rename(old, new)

    def capacity(self) -> int:
        """Bytes of the largest chunk's states on the stage."""
        parameters = dict(self._model.named_parameters())
        chunks = [self.share.chunk(c) for c in self._model.plan.chunks]
        return max(stage_capacity_nbytes(c, parameters, self._spec) for c in chunks)

    def settle_ties(self) -> None:
        """Let weights loaded from a checkpoint, perhaps after it, be those that this format of masters has at ties."""
        for parameter, tied in self._ties.items():
            tied.settle(parameter, self._spec.master == "remainder")
        self._ties.clear()

    def _is_pinned(self) -> bool:
        return self._model.compute_device.type == "cuda"

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        """A parameter's state, made when it is first asked for; tensors only where host memory keeps them."""
        if parameter not in self._known:
            size = size_along(parameter, cut_dim(parameter.shape))
            kept = next(states for states in self._kept if states.holds(parameter))
            tensors = kept.zeros(parameter, self._model.compute_device) if self._spec.is_kept else {}
            self._known[parameter] = {"slice_steps": uniform(size), **tensors}
        return cast(dict[str, Any], self._known[parameter])

    def _idle_stage(self) -> Stage:
        """The stage before anything is announced: it takes no memory."""
        cpu = torch.device("cpu")
        return Stage(cpu) if self._spec.is_kept else FreshStage(cpu, 0)

    def _make_stage(self, device: torch.device) -> Stage:
        if not self._spec.is_kept:
            return FreshStage(device, self.capacity())
        return make_stage(device, self.capacity())

    def host(self, s: ActiveSlice) -> list[Tensor]:
        """The states of a slice, of this rank's share, in host memory; without memory for states that are not kept."""
        state, layouts = self._state_of(s.parameter), self._spec.layouts(s.parameter)
        if not self._spec.is_kept:
            whole = {key: torch.empty(n.shape, dtype=n.dtype, device="meta") for key, n in layouts.items()}
            return [_slice_of(t, layouts[key], s, 0) for key, t in whole.items()]
        first = self.share.of(s.slice.size)[0]
        return [_slice_of(state[key], layout, s, first) for key, layout in layouts.items()]


def _slice_of(state: Tensor, layout: StateLayout, s: ActiveSlice, first: int) -> Tensor:
    """A slice's part of a parameter's state, which begins at index ``first``, the cut dimension in front; all of one
    that belongs to the whole."""
    return layout.front(state, s.dim).narrow(0, s.start - first, s.length) if layout.is_sliced else state

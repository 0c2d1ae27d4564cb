"""Decides where host memory keeps each tensor of the optimizer states, how much all take, and whether they fit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from chunkft_fx.bytes import format_bytes
from chunkft_fx.copies.host_memory import available_nbytes, paged, pinned_zeros
from chunkft_fx.copies.tier import LARGEST_SLAB
from chunkft_fx.errors import HostMemoryExceeded
from chunkft_fx.graph.layout import stage_nbytes
from chunkft_fx.plan.chunk import ALL, Share
from chunkft_fx.plan.cuts import cut_dim
from chunkft_fx.plan.state_spec import StateLayout, StateSpec
from chunkft_fx.ranks.ranks import on_this_host
from chunkft_fx.torch_internals import release_idle_pinned


class HostStates:
    """The state tensors of all parameters, their places planned together, their memory taken as it is needed.

    Pinned tensors lie in slabs of whole pages, in the order of the parameters, so that neighbours move in one copy.
    A slab is pinned when its first tensor is asked for. Of several ranks each has those of its ``share``.
    """

    def __init__(self, parameters: Sequence[Tensor], spec: StateSpec, share: Share = ALL) -> None:
        self._layouts = [
            {key: _shared(layout, share, cut_dim(p.shape)) for key, layout in spec.layouts(p).items()}
            for p in parameters
        ]
        self._index = {id(p): i for i, p in enumerate(parameters)}
        sizes = [[layout.nbytes for layout in layouts.values()] for layouts in self._layouts]
        self._sizes = list(chain.from_iterable(sizes))
        self._first = [sum(len(s) for s in sizes[:i]) for i in range(len(sizes))]
        self._places, self._slab_sizes = pack(self._sizes)
        self._slabs: dict[int, Tensor] = {}
        self._asked: set[int] = set()

    def nbytes(self, pinned: bool) -> int:
        """Bytes of host memory that the states of all parameters take."""
        return sum(self._slab_sizes) if pinned else sum(self._sizes)

    def untaken_nbytes(self, pinned: bool) -> int:
        """Bytes of it that are still to be taken, when states are first asked for."""
        if pinned:
            return sum(nbytes for i, nbytes in enumerate(self._slab_sizes) if i not in self._slabs)
        return sum(nbytes for i, nbytes in enumerate(self._sizes) if i not in self._asked)

    def holds(self, parameter: Tensor) -> bool:
        """Whether a parameter's states have their place here."""
        return id(parameter) in self._index

    def rename(self, parameter: Tensor, other: Tensor) -> None:
        """Let another parameter of the same shape and dtype have the places of this one, if they are here."""
        if id(parameter) in self._index:
            self._index[id(other)] = self._index.pop(id(parameter))

    def zeros(self, parameter: Tensor, device: torch.device) -> dict[str, Tensor]:
        """The state tensors of one parameter by name; those that are cut have the cut dimension outermost in memory.

        They are pinned for a ``device`` that is a GPU.
        """
        index = self._index[id(parameter)]
        named = enumerate(self._layouts[index].items(), start=self._first[index])
        return {key: self._tensor(at, layout, parameter, device) for at, (key, layout) in named}

    def _tensor(self, at: int, layout: StateLayout, parameter: Tensor, device: torch.device) -> Tensor:
        dim = cut_dim(parameter.shape)
        self._asked.add(at)
        has_its_shape = layout.is_sliced and not layout.by_index
        shape = layout.shape or (1,)
        if has_its_shape:
            shape = (shape[dim], *shape[:dim], *shape[dim + 1 :])
        if device.type == "cuda":
            host = self._pinned(at, device).view(layout.dtype).view(shape)
        else:
            host = torch.zeros(shape, dtype=layout.dtype)
        if not has_its_shape:
            return host
        if parameter.ndim:
            return host.movedim(0, dim)
        return host.view(()) if len(host) else host  # of a scalar all ranks but one have nothing

    def _pinned(self, at: int, device: torch.device) -> Tensor:
        slab, offset = self._places[at]
        if slab not in self._slabs:
            self._slabs[slab] = pinned_zeros(self._slab_sizes[slab], device)
        return self._slabs[slab][offset : offset + self._sizes[at]]


def _shared(layout: StateLayout, share: Share, dim: int) -> StateLayout:
    """A state tensor with the indices of a share alone, of a parameter that is cut along ``dim``."""
    if share.is_all or not layout.is_sliced:
        return layout
    at = 0 if layout.by_index else dim
    sizes = list(layout.shape) or [1]
    sizes[at] = share.of(sizes[at])[1]
    return layout._replace(shape=tuple(sizes))


def pack(sizes: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """First fit: the slab and the offset of each of these tensors, in bytes, and the sizes of the slabs.

    A slab is of whole pages, and larger than `LARGEST_SLAB` only for a tensor that is.
    """
    places: list[tuple[int, int]] = []
    used: list[int] = []
    limits: list[int] = []
    for nbytes in sizes:
        taken = stage_nbytes(nbytes)
        slab = next((i for i, u in enumerate(used) if u + taken <= limits[i]), len(used))
        if slab == len(used):
            used.append(0)
            limits.append(max(LARGEST_SLAB, paged(taken)))
        places.append((slab, used[slab]))
        used[slab] += taken
    return places, [paged(u) for u in used]


def require_room(states: HostStates, pinned: bool, host_budget: int | None, smaller: Sequence[str] = ()) -> None:
    """Raise `HostMemoryExceeded` if the states do not fit ``host_budget`` or, without one, available memory.

    ``smaller`` are options of the optimizer with which its states take less.
    """
    needed = states.nbytes(pinned)
    limit = available_nbytes() // on_this_host() if host_budget is None else host_budget
    if needed > limit and host_budget is None and pinned:
        release_idle_pinned()  # of an optimizer that is gone, say
        limit = available_nbytes() // on_this_host()
    if needed <= limit:
        return
    what = "available physical memory is" if host_budget is None else "host_budget is"
    choices = ['states="reset" (keeps none in host memory)', *smaller]
    choices.append("a larger host_budget" if host_budget is not None else "a machine with more memory")
    kind = "pinned host memory" if pinned else "host memory"
    raise HostMemoryExceeded(
        f"the optimizer states of all parameters take {format_bytes(needed)} ({needed} bytes) of {kind}, "
        f"{what} {format_bytes(limit)}; use {', or '.join(choices)}",
        needed,
        limit,
    )

"""Decides what an optimizer keeps and moves, as data: its state tensors by name, with shape and dtype by parameter.

The planner, the stage, host memory, checkpoints and predictions read this description alone. It is plain data, stands
in plans, and says nothing of how an update is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from chunkft_fx.errors import OptimizerMismatch, OptionError
from chunkft_fx.graph.layout import blocks_of, front, stage_nbytes, wide_dtype
from chunkft_fx.plan.chunk import Chunk, Slice
from chunkft_fx.plan.cuts import cut_dim

# What the user calls the formats in which states can be kept: numbers of these dtypes, or codes with scales.
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": torch.uint8}
# States are kept in 8 bits where an index of the cut dimension has so many elements, for it has scales of its own.
# Those of vectors and thin matrices stay float32: their scales would take what their codes save.
LEAST_ROW = 64
# What the names of an 8-bit state's two tensors end in.
CODES, SCALES = "_codes", "_scales"
STATES = ("keep", "reset")
# When weights change: in the optimizer's step, from it on into the next forward, or in the backward.
UPDATES = ("step", "late", "backward")
# Formats of a bfloat16 weight's master, a float32 or the 16 bits that the weight lacks; the states of these names.
MASTERS = ("float32", "remainder")
MASTER, REMAINDER = "master", "remainder"


class StateLayout(NamedTuple):
    """One state tensor of one parameter.

    A tensor that ``is_sliced`` lies with the parameter's cut dimension outermost in memory: every slice of it, seen
    through ``front``, is one contiguous run. It has the parameter's shape, or is a matrix with a row for each index of
    the cut dimension (``by_index``). Any other belongs to the whole parameter.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_sliced: bool
    by_index: bool = False

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def front(self, state: Tensor, dim: int) -> Tensor:
        """A view of this tensor with the parameter's cut dimension ``dim`` in front, if it is sliced."""
        return state if self.by_index or not self.is_sliced else front(state, dim)


@dataclass(frozen=True)
class StateTensor:
    """One kind of state: ``name`` as in checkpoints of torch's optimizer.

    ``dtype`` is a word of `STATE_DTYPES`; for float64 parameters it is float64 whatever is said here. ``of`` is "all"
    parameters, the "matrices" among them (two dimensions or more) or the "vectors" (all others). A state has its
    parameter's shape, but size 1 in dimension ``mean_over`` (-1 or -2) where that is given. One that ``is_signed`` can
    have values below zero.

    In "8bit" a state is two tensors (`kernels.blocks`): codes in the parameter's shape, and float32 scales, a row for
    each index of the cut dimension, so that any slice of a parameter has whole blocks. Where such an index has fewer
    than `LEAST_ROW` elements the state is float32.
    """

    name: str
    dtype: str = "float32"
    of: str = "all"
    mean_over: int | None = None
    is_signed: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in STATE_DTYPES:
            raise OptionError(f"state_dtype={self.dtype!r} is not known; choose one of {', '.join(STATE_DTYPES)}")
        if self.dtype == "8bit" and self.mean_over is not None:
            raise OptionError(f"{self.name} belongs to whole parameters, and 8-bit blocks to slices; use float32")

    def belongs_to(self, dimensions: int) -> bool:
        """Whether parameters of so many dimensions have this state."""
        return self.of == "all" or (self.of == "matrices") == (dimensions > 1)

    def layouts(self, shape: Sequence[int], dtype: torch.dtype) -> dict[str, StateLayout]:
        """The state of a parameter of this shape and dtype: its tensors by name."""
        own = torch.float64 if dtype == torch.float64 else STATE_DTYPES[self.dtype]
        sizes = list(shape)
        if self.mean_over is not None:
            sizes[self.mean_over] = 1
        if own != torch.uint8:
            return {self.name: StateLayout(tuple(sizes), own, self.mean_over is None)}
        size = size_of_cut(shape)
        row = prod(shape) // max(size, 1)
        if row < LEAST_ROW:
            return {self.name: StateLayout(tuple(sizes), torch.float32, True)}
        return {
            self.name + CODES: StateLayout(tuple(sizes), own, True),
            self.name + SCALES: StateLayout((size, blocks_of(row)), torch.float32, True, by_index=True),
        }


@dataclass(frozen=True)
class StateSpec:
    """An optimizer as all but its update knows it.

    ``tensors`` are its states beside the master weight, which every low-precision parameter has. ``states`` is "keep"
    (host memory keeps those of all chunks) or "reset" (they begin anew with every activation). ``update_nbytes`` is
    what the update of one element of a low-precision weight moves in device memory. An optimizer that ``is_whole``
    updates a parameter by numbers of its whole: no chunk may then hold a part of one. ``saves_steps`` says whether
    torch's optimizer of this name has a step count in its checkpoints. ``master`` is the format of a bfloat16
    parameter's master weight (`chunkft_fx.kernels.masters`); that of a float16 one is float32 in either. ``updates``
    says when weights change: at the optimizer's "step", "late" (from the step on, as far as the forward after it) or in
    the "backward".

    Raises `OptionError` for a word that is not known.
    """

    optimizer: str
    tensors: tuple[StateTensor, ...]
    states: str = "keep"
    update_nbytes: int = 32
    is_whole: bool = False
    saves_steps: bool = True
    master: str = "float32"
    updates: str = "step"

    def __post_init__(self) -> None:
        if self.master not in MASTERS:
            raise OptionError(f"master={self.master!r} is not known; choose one of {', '.join(MASTERS)}")
        if self.states not in STATES:
            raise OptionError(f"states={self.states!r} is not known; choose one of {', '.join(STATES)}")
        if self.updates not in UPDATES:
            raise OptionError(f"update={self.updates!r} is not known; choose one of {', '.join(UPDATES)}")
        if not self.is_whole and any(t.mean_over is not None for t in self.tensors):
            raise OptionError(f"states of {self.optimizer} belong to whole parameters, so is_whole must be True")

    @property
    def in_backward(self) -> bool:
        """Whether weights are updated within the backward that makes their gradients."""
        return self.updates == "backward"

    @property
    def needs_all(self) -> bool:
        """Whether a step has to cover all parameters."""
        return self.updates != "step"

    @property
    def is_late(self) -> bool:
        """Whether updates of a step may still run when the next forward begins."""
        return self.updates == "late"

    @property
    def is_kept(self) -> bool:
        """Whether host memory keeps states, so that those of a chunk are copied between host and device."""
        return self.states == "keep"

    def layouts(self, parameter: Tensor) -> Mapping[str, StateLayout]:
        """A parameter's state tensors by name; a float32 or float64 parameter is its own master."""
        return _layouts(self.tensors, self.master, parameter.shape, parameter.dtype)

    def element_nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Optimizer-state bytes per element of a parameter, without those of `index_nbytes` and of the whole."""
        layouts = _layouts(self.tensors, self.master, tuple(shape), dtype).values()
        return sum(n.dtype.itemsize for n in layouts if n.is_sliced and not n.by_index)

    def index_nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Optimizer-state bytes that each index of a parameter's cut dimension takes beside those of its elements."""
        layouts = _layouts(self.tensors, self.master, tuple(shape), dtype).values()
        return sum(n.shape[1] * n.dtype.itemsize for n in layouts if n.by_index)

    def slice_nbytes(self, parameter: Tensor, length: int) -> int:
        """Optimizer-state bytes of ``length`` indices of a parameter's cut dimension, without those of the whole."""
        size = size_of_cut(parameter.shape)
        layouts = self.layouts(parameter).values()
        return sum(n.nbytes // size * length for n in layouts if n.is_sliced)

    def covers(self, other: StateSpec) -> bool:
        """Whether memory planned for this is enough for the other, whatever the parameters are."""
        if (other.is_whole and not self.is_whole) or other.updates != self.updates:
            return False
        if any(t.mean_over is not None for t in other.tensors):
            return self == other
        dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        return all(self._has_room(other, shape, dtype) for dtype in dtypes for shape in _KINDS)

    def _has_room(self, other: StateSpec, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Each tensor of a slice is aligned on the stage, so that more tensors of as many bytes can take more."""
        ours, theirs = (_layouts(spec.tensors, spec.master, shape, dtype).values() for spec in (self, other))
        nbytes = [sum(n.nbytes for n in layouts if n.is_sliced) for layouts in (ours, theirs)]
        return nbytes[0] >= nbytes[1] and len(ours) >= len(theirs)


# Shapes of all the kinds of parameters that have other states: vectors, thin matrices, and those with 8-bit states.
_KINDS = ((1,), (1, 1), (LEAST_ROW, LEAST_ROW))


def size_of_cut(shape: Sequence[int]) -> int:
    """The number of indices along the cut dimension of a parameter of this shape."""
    return shape[cut_dim(shape)] if shape else 1


def require_whole(slices: Iterable[Slice], spec: StateSpec) -> None:
    """Raise `OptimizerMismatch` for a slice that is cut, if the optimizer updates parameters as a whole."""
    part = next((s for s in slices if not s.is_whole), None) if spec.is_whole else None
    if part is not None:
        raise OptimizerMismatch(
            f"{spec.optimizer} updates a parameter by numbers of its whole, but a chunk holds {part.length} of the "
            f"{part.size} indices of {part.name!r}; make the optimizer before the first training step, so that chunks "
            "are cut between parameters"
        )


@functools.lru_cache(maxsize=4096)  # asked in every step for every slice
def _layouts(
    tensors: tuple[StateTensor, ...], master: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Mapping[str, StateLayout]:
    own = [t.layouts(shape, dtype) for t in tensors if t.belongs_to(len(shape))]
    found = {name: layout for layouts in own for name, layout in layouts.items()}
    return found | _master_layout(master, shape, dtype)


def _master_layout(master: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, StateLayout]:
    """The state that holds a parameter's master weight, in this format, if it has one."""
    wide = wide_dtype(dtype)
    if wide == dtype:
        return {}
    if master == "remainder" and dtype == torch.bfloat16:
        return {REMAINDER: StateLayout(tuple(shape), torch.int16, True)}
    return {MASTER: StateLayout(tuple(shape), wide, True)}


class HasSpec(Protocol):
    """An optimizer, as far as a plan knows it."""

    @property
    def spec(self) -> StateSpec: ...


# What is planned for as long as no optimizer exists: none of this library needs more, alignment of 8-bit scales aside.
ASSUMED = StateSpec("AdamW", (StateTensor("exp_avg"), StateTensor("exp_avg_sq", is_signed=False)))


def spec_of(optimizer: HasSpec | None) -> StateSpec:
    """The spec of an optimizer, or that to assume without one."""
    return ASSUMED if optimizer is None else optimizer.spec


def master_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of a parameter's master weight and gradients."""
    return wide_dtype(parameter.dtype)


def stage_capacity_nbytes(chunk: Chunk, parameters: Mapping[str, Tensor], spec: StateSpec = ASSUMED) -> int:
    """Bytes of device memory that the stage takes for the states of a chunk, alignment included.

    ``parameters`` maps names to parameters of any device (meta too).
    """
    return sum(_slice_nbytes(s, parameters[s.name], spec) for s in chunk.slices)


def _slice_nbytes(s: Slice, parameter: Tensor, spec: StateSpec) -> int:
    layouts = spec.layouts(parameter).values()
    return sum(stage_nbytes(n.nbytes // s.size * s.length if n.is_sliced else n.nbytes) for n in layouts)

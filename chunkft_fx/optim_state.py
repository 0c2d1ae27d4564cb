"""The state of one parameter: which tensors, their dtype and layout, and how a master follows its weight.

State tensors have the parameter's shape, but the cut dimension outermost in memory: every slice of
them, seen through ``front``, is one contiguous run.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from chunkft_fx.errors import OptionError
from chunkft_fx.plan import Chunk, Slice
from chunkft_fx.streaming import stage_nbytes

# Elements compared at once when a master is checked against its weight: bounds the temporary memory.
PIECE_NUMEL = 2**24
MOMENTS = ("exp_avg", "exp_avg_sq")
# What the user calls the dtypes in which moments can be kept.
MOMENT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def moment_dtype(state_dtype: str) -> torch.dtype:
    """The dtype that the option ``state_dtype`` names; raises `OptionError` for another word."""
    if state_dtype not in MOMENT_DTYPES:
        raise OptionError(f"state_dtype={state_dtype!r} is not known; choose one of {', '.join(MOMENT_DTYPES)}")
    return MOMENT_DTYPES[state_dtype]


def master_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of a parameter's master weight and gradients: its own, but float32 at least."""
    return torch.promote_types(parameter.dtype, torch.float32)


def state_dtypes(parameter: Tensor, moments: torch.dtype = torch.float32) -> dict[str, torch.dtype]:
    """A parameter's state tensors by name, with their dtypes; a float32 or float64 parameter is its own master.

    The moments of a float64 parameter are float64 whatever was asked for.
    """
    wide = master_dtype(parameter)
    dtypes = dict.fromkeys(MOMENTS, wide if wide == torch.float64 else moments)
    return dtypes if wide == parameter.dtype else dtypes | {"master": wide}


def stage_capacity_nbytes(chunk: Chunk, parameters: Mapping[str, Tensor], state_dtype: str = "float32") -> int:
    """Bytes of device memory that the stage takes for the states of a chunk, alignment included.

    ``parameters`` maps names to parameters of any device (meta too), ``state_dtype`` is AdamW's option.
    """
    moments = moment_dtype(state_dtype)
    return sum(_slice_nbytes(s, parameters[s.name], moments) for s in chunk.slices)


def _slice_nbytes(s: Slice, parameter: Tensor, moments: torch.dtype) -> int:
    numel = parameter.numel() // s.size * s.length
    return sum(stage_nbytes(numel * d.itemsize) for d in state_dtypes(parameter, moments).values())


def size_along(parameter: Tensor, dim: int) -> int:
    """The number of indices along ``dim``; a scalar has one."""
    return parameter.shape[dim] if parameter.ndim else 1


def front(t: Tensor, dim: int) -> Tensor:
    """A view with the cut dimension in front, without autograd; a scalar becomes one index."""
    return t.detach().movedim(dim, 0) if t.ndim else t.detach().view(1)


def reconcile(master: Tensor, weight: Tensor) -> None:
    """Make each weight that is not its master rounded, being new or changed from outside, the master.

    Both are seen through ``front``; ``master`` is written in place.
    """
    indices = max(1, PIECE_NUMEL * len(weight) // weight.numel())
    for start in range(0, len(weight), indices):
        m, w = master[start : start + indices], weight[start : start + indices]
        torch.where(m.to(w.dtype) == w, m, w.to(m.dtype), out=m)

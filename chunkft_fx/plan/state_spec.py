"""The state of one parameter: which tensors, their dtype and layout, and how a master follows its weight.

State tensors have the parameter's shape, but the cut dimension outermost in memory: every slice of
them, seen through ``front``, is one contiguous run.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from chunkft_fx.errors import OptionError
from chunkft_fx.graph.layout import stage_nbytes
from chunkft_fx.plan.chunk import Chunk, Slice

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

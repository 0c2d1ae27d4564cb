"""The state of one parameter: which tensors, their dtype and layout, and how a master follows its weight.

State tensors have the parameter's shape, but the cut dimension outermost in memory: every slice of
them, seen through ``front``, is one contiguous run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chunkft_fx.cuts import cut_dim
from chunkft_fx.host_memory import HostMemory
from chunkft_fx.step_counts import uniform

# Elements compared at once when a master is checked against its weight: bounds the temporary memory.
PIECE_NUMEL = 2**24


def state_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of a parameter's moments and master weight: its own, but float32 at least."""
    return torch.promote_types(parameter.dtype, torch.float32)


def state_keys(parameter: Tensor) -> tuple[str, ...]:
    """The names of a parameter's state tensors; a float32 or float64 parameter is its own master."""
    moments = ("exp_avg", "exp_avg_sq")
    return moments if state_dtype(parameter) == parameter.dtype else (*moments, "master")


def size_along(parameter: Tensor, dim: int) -> int:
    """The number of indices along ``dim``; a scalar has one."""
    return parameter.shape[dim] if parameter.ndim else 1


def front(t: Tensor, dim: int) -> Tensor:
    """A view with the cut dimension in front, without autograd; a scalar becomes one index."""
    return t.detach().movedim(dim, 0) if t.ndim else t.detach().view(1)


def new_state(parameter: Tensor, memory: HostMemory, pinned: bool) -> dict[str, Any]:
    """The state of a parameter that was never updated: zeros, pinned for updates on CUDA."""
    dim = cut_dim(parameter.shape)
    state: dict[str, Any] = {"slice_steps": uniform(size_along(parameter, dim))}
    for key in state_keys(parameter):
        host = memory.zeros(front(parameter, dim).shape, state_dtype(parameter), pinned)
        state[key] = host.movedim(0, dim) if parameter.ndim else host.view(())
    return state


def reconcile(master: Tensor, weight: Tensor) -> None:
    """Make each weight that is not its master rounded, being new or changed from outside, the master.

    Both are seen through ``front``; ``master`` is written in place.
    """
    indices = max(1, PIECE_NUMEL * len(weight) // weight.numel())
    for start in range(0, len(weight), indices):
        m, w = master[start : start + indices], weight[start : start + indices]
        torch.where(m.to(w.dtype) == w, m, w.to(m.dtype), out=m)

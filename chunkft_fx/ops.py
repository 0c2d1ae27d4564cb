"""Operators of this library that appear in rewritten graphs.

``chunkft_fx::narrow(x, dim, start, length)`` is a slice whose ``start`` is a run-time value and whose
``length`` is static, so that one compiled variant serves every chunk that cuts a tensor at the same
fraction. ``start`` is an ``i64[]`` tensor on the CPU: no symbol, no guard, no device synchronisation.
The result is a contiguous copy, because an operator without alias annotation must not return a view.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("chunkft_fx", "DEF")
_LIBRARY.define("narrow(Tensor x, int dim, Tensor start, SymInt length) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _narrow(x: Tensor, dim: int, start: Tensor, length: int) -> Tensor:
    return x.narrow(dim, int(start), length).clone(memory_format=torch.contiguous_format)


def _narrow_meta(x: Tensor, dim: int, start: Tensor, length: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = length
    return x.new_empty(shape)


_LIBRARY.impl("narrow", _narrow, "CPU")
_LIBRARY.impl("narrow", _narrow, "CUDA")
torch.library.register_fake("chunkft_fx::narrow", _narrow_meta, lib=_LIBRARY)

narrow = torch.ops.chunkft_fx.narrow.default

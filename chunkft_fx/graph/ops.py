"""Defines the operators of this library that appear in rewritten graphs.

Region graphs: ``chunkft_fx::narrow(x, dim, start, length)`` is a slice whose ``start`` is a run-time value and whose
``length`` is static, so that one compiled variant serves every chunk that cuts a tensor at the same
fraction. ``start`` is an ``i64[]`` tensor on the CPU: no symbol, no guard, no device synchronisation.
The result is a contiguous copy, because an operator without alias annotation must not return a view.

Programs: the stream nodes. ``fetch(host, device, buffer) -> copies`` begins to bring tensors into a ring buffer of
the device; ``wait(copies)`` stands before their first use, ``release(copies)`` behind their last: then the buffer
can be filled again. With ``buffer = FRESH`` the copies are tensors of their own, which die with their last use and
are not released. ``offload(device_values) -> host`` begins to copy values to host memory; ``release(device_values)``
ends that, and their own memory can be used again. ``admit(share)`` lets this share of the active chunk's optimizer
states begin to come in, for the update behind the program.
In a program that covers all parameters states move piece by piece: ``fetch_states(piece)`` begins to bring those of one
piece into the ring of states, ``update(gradients, piece)`` waits for them and changes its weights and states, and
``write_states(piece)`` begins to take the states back, and frees their buffer once they are there. Where gradients wait
in host memory for the optimizer's step, the same nodes move what waits there of a piece, and
``keep(gradients, piece)``, in the place of ``update``, adds to it.
In a program that runs several micro-batches ``add_up([total, gradient]) -> total`` adds the gradient that one of them
gives to the sum of those before it, in float32 at least.
In a program of one of several ranks ``reduce(contributions) -> mean`` adds up the contributions to a gradient and
begins to average the sum over ranks; for one rank by itself the sum is the mean.
As operators they are plain synchronous copies, so that a program means the same wherever it runs; the run time
lowers them to copy streams, a ring of buffers (`copies.weight_ring`) and reused host memory (`copies.saved_values`).
"""

from __future__ import annotations

import torch
from torch import Tensor

# The two parts of a step; no copy lives across the border, since two forwards can come before a backward.
PARTS = ("forward", "backward")

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


def _fetch(host: list[Tensor], device: torch.device, buffer: int) -> list[Tensor]:
    return [torch.empty_like(t, device=device).copy_(t) for t in host]


def _fetch_meta(host: list[Tensor], device: torch.device, buffer: int) -> list[Tensor]:
    return [torch.empty_like(t, device=device) for t in host]


def _offload(device_values: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t, device="cpu").copy_(t) for t in device_values]


def _offload_meta(device_values: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t, device="cpu") for t in device_values]


def _add_up(contributions: list[Tensor]) -> Tensor:
    total, gradient = contributions
    return total.to(torch.promote_types(total.dtype, torch.float32), copy=True).add_(gradient)


def _reduce(contributions: list[Tensor]) -> Tensor:
    first, *rest = contributions
    total = first.to(torch.promote_types(first.dtype, torch.float32), copy=True)
    for value in rest:
        total.add_(value)
    return total


def _nothing(_: list[Tensor] | float, __: int = 0) -> None:
    """Does nothing: a stream node stands for an order. Its schema says that it writes the copies, which keeps uses of
    them on their side of it.
    """


_LIBRARY.define("fetch(Tensor[] host, Device device, int buffer) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define("wait(Tensor(a!)[] copies) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define("release(Tensor(a!)[] copies) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define("offload(Tensor[] device_values) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("fetch", _fetch, "CompositeExplicitAutograd")
_LIBRARY.impl("wait", _nothing, "CompositeExplicitAutograd")
_LIBRARY.impl("release", _nothing, "CompositeExplicitAutograd")
_LIBRARY.define("admit(float share) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("admit", _nothing, "CompositeExplicitAutograd")
_LIBRARY.impl("offload", _offload, "CompositeExplicitAutograd")
_LIBRARY.define("add_up(Tensor[] contributions) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("add_up", _add_up, "CompositeExplicitAutograd")
_LIBRARY.define("reduce(Tensor[] contributions) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("reduce", _reduce, "CompositeExplicitAutograd")
_LIBRARY.define("fetch_states(int piece) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define("update(Tensor(a!)[] gradients, int piece) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define("keep(Tensor(a!)[] gradients, int piece) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define("write_states(int piece) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
for _name in ("fetch_states", "update", "keep", "write_states"):
    _LIBRARY.impl(_name, _nothing, "CompositeExplicitAutograd")
    torch.library.register_fake(f"chunkft_fx::{_name}", _nothing, lib=_LIBRARY)
torch.library.register_fake("chunkft_fx::fetch", _fetch_meta, lib=_LIBRARY)
torch.library.register_fake("chunkft_fx::wait", _nothing, lib=_LIBRARY)
torch.library.register_fake("chunkft_fx::release", _nothing, lib=_LIBRARY)
torch.library.register_fake("chunkft_fx::offload", _offload_meta, lib=_LIBRARY)
torch.library.register_fake("chunkft_fx::admit", _nothing, lib=_LIBRARY)
torch.library.register_fake("chunkft_fx::add_up", _add_up, lib=_LIBRARY)
torch.library.register_fake("chunkft_fx::reduce", _reduce, lib=_LIBRARY)

fetch = torch.ops.chunkft_fx.fetch.default
wait = torch.ops.chunkft_fx.wait.default
release = torch.ops.chunkft_fx.release.default
offload = torch.ops.chunkft_fx.offload.default
admit = torch.ops.chunkft_fx.admit.default
add_up = torch.ops.chunkft_fx.add_up.default
reduce = torch.ops.chunkft_fx.reduce.default
fetch_states = torch.ops.chunkft_fx.fetch_states.default
update = torch.ops.chunkft_fx.update.default
keep = torch.ops.chunkft_fx.keep.default
write_states = torch.ops.chunkft_fx.write_states.default

# Stands for the number of a ring buffer in a fetch whose copies get memory of their own.
FRESH = -1
# All stream nodes: the first three in the order in which one buffer of the ring sees them.
STREAM_NODES = (fetch, wait, release, offload, admit, add_up, reduce, fetch_states, update, keep, write_states)
# Those that make a gradient of several.
SUMS = (add_up, reduce)
# Those that take the gradients of a piece, of which a program has one kind.
TAKERS = (update, keep)
# Those of pieces, in the order in which one piece sees them.
PIECE_NODES = (fetch_states, *TAKERS, write_states)

"""Copies of many tensors between pinned host memory and the device in one launch.

The copy engine (``Tensor.copy_`` with ``non_blocking=True`` on a copy stream) is the first choice for few large
tensors: it takes no multiprocessor from the work beside it. But each of its copies is a call of its own, which costs
some microseconds to enqueue and to start, and copies of one stream run one after another. This kernel is for chunks
of many small slices (norms, biases, slices of a later dimension once packed), and where both directions should run at
once in the order of one stream.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chunkft_fx.errors import OptionError
from chunkft_fx.kernels.launch import LaunchOptions, current_device, device_table, is_aligned, require_reachable

tl: Any = None  # triton.language once the kernel is made: torch's CPU builds come without Triton


def copy(sources: Sequence[Tensor], destinations: Sequence[Tensor]) -> None:
    """Copy each source to its destination: contiguous tensors of one dtype and number of elements.

    With one tensor on CUDA a kernel on its device and current stream copies all of them, and does not wait: pinned
    memory must live, and stay unread, until it has finished. Otherwise torch copies.

    Raises `OptionError` for tensors that do not match, and for memory that the kernel cannot reach.
    """
    if len(sources) != len(destinations):
        raise OptionError(f"{len(sources)} sources cannot be copied to {len(destinations)} destinations")
    for source, destination in zip(sources, destinations, strict=True):
        _check(source, destination)
    device = next((t.device for t in (*sources, *destinations) if t.is_cuda), None)
    if device is None:
        copy_reference(sources, destinations)
    else:
        launch_copy(sources, destinations, device)


def copy_reference(sources: Sequence[Tensor], destinations: Sequence[Tensor]) -> None:
    """What the kernel does, in torch's operators: on CUDA, copies of the copy engine."""
    for source, destination in zip(sources, destinations, strict=True):
        destination.view(-1).copy_(source.view(-1), non_blocking=True)


def launch_copy(
    sources: Sequence[Tensor],
    destinations: Sequence[Tensor],
    device: torch.device,
    launch: LaunchOptions | None = None,
) -> None:
    """Run the kernel on tensors that `copy` would pass: one launch for all that are copied in words of one size."""
    launch = launch or LaunchOptions()
    groups: dict[tuple[int, bool], list[tuple[int, int, int]]] = {}
    for source, destination in zip(sources, destinations, strict=True):
        require_reachable(source, device, "a source")
        require_reachable(destination, device, "a destination")
        places = (source.data_ptr(), destination.data_ptr())
        word = _word(*places, source.nbytes)
        if source.nbytes:
            variant = (word, is_aligned((source, destination)))
            groups.setdefault(variant, []).append((source.nbytes // word, *places))
    host = any(t.device.type == "cpu" for t in (*sources, *destinations))
    for (word, aligned), rows in groups.items():
        ends = np.cumsum([-(-words // launch.tile) for words, _, _ in rows])
        with current_device(device):
            _kernel()[(launch.programs(int(ends[-1]), device, host),)](
                device_table(np.concatenate([ends, np.array(rows).reshape(-1)]), device),
                len(rows),
                WORD_BITS=8 * word,
                ALIGNED=aligned,
                TILE=launch.tile,
                num_warps=launch.num_warps,
            )


def _word(*counts: int) -> int:
    """The largest word, in bytes, that divides all of these addresses and sizes."""
    return next(n for n in (4, 2, 1) if all(c % n == 0 for c in counts))


def _check(source: Tensor, destination: Tensor) -> None:
    if source.dtype != destination.dtype or source.numel() != destination.numel():
        raise OptionError(
            f"{source.numel()} elements of {source.dtype} cannot be copied to "
            f"{destination.numel()} of {destination.dtype}"
        )
    for name, t in (("a source", source), ("a destination", destination)):
        if not t.is_contiguous():
            raise OptionError(f"{name} has strides {t.stride()} for shape {tuple(t.shape)}; make it contiguous")


@functools.cache
def _kernel() -> Any:
    global tl
    import triton
    import triton.language as tl

    # the table: by row the number of tiles up to its end, then the rows: words, and addresses of source and destination
    @triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator, unused-ignore]
    def copy_words(  # type: ignore[no-untyped-def]
        table, rows, WORD_BITS: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        word = tl.pointer_type(tl.uint32 if WORD_BITS == 32 else tl.uint16 if WORD_BITS == 16 else tl.uint8)
        within = tl.arange(0, TILE)
        tile = tl.program_id(0)
        begin = tile.to(tl.int64) * 0
        index = 0
        while index < rows:
            end = tl.load(table + index)
            if tile < end:
                row = table + rows + index * 3
                words = tl.load(row)
                source = tl.load(row + 1).to(word)
                destination = tl.load(row + 2).to(word)
                if ALIGNED:
                    source = tl.multiple_of(source, 16)
                    destination = tl.multiple_of(destination, 16)
                while tile < end:
                    start = (tile - begin) * TILE
                    if start + TILE <= words:
                        tl.store(destination + start + within, tl.load(source + start + within))
                    else:
                        mask = within < words - start
                        tl.store(destination + start + within, tl.load(source + start + within, mask=mask), mask=mask)
                    tile += tl.num_programs(0)
            begin = end
            index += 1

    return copy_words

"""Runs the softmax cross-entropy of a block of logits, and writes its gradient in the place of the logits.

One call does for ``[rows, classes]`` logits what autograd does in a forward and a backward: the loss of
each row and, if a scale is given, the gradient of ``scale * sum(losses)``, which overwrites the logits. A
row whose label is ``ignore_index`` has a loss and a gradient of zero. With smoothing ``e``, the target
distribution is ``(1 - e) * onehot(label) + e / classes`` (Szegedy et al., arXiv 1512.00567, as torch has it).

On CUDA it is a Triton kernel, one program a row: a first pass over the row finds maximum and
denominator together (online softmax, Milakov and Gimelshein, arXiv 1805.02867), a second one writes.
The reference does the same with torch's operators; it serves the CPU, and float64 everywhere.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from chunkft_fx.graph.layout import wide_dtype
from chunkft_fx.kernels.launch import current_device

tl: Any = None  # triton.language once the kernel is made: CPU builds of torch come without triton

# 4096 logits a step: 16 a thread with 8 warps, so that one step's loads cover the latency of the next.
_BLOCK = 4096
_WARPS = 8


def softmax_cross_entropy_(
    logits: Tensor, labels: Tensor, losses: Tensor, scale: Tensor | None, ignore: int, smoothing: float
) -> None:
    """Fill ``losses``; with a ``scale``, overwrite ``logits`` by its gradient, else by nothing of use.

    ``logits`` is ``[rows, classes]`` with contiguous rows, ``labels`` ``i64[rows]``, contiguous. ``losses``
    is ``[rows]`` in the dtype to compute in (float32 or float64), ``scale`` is a scalar tensor of it. The
    gradient is rounded to the logits' dtype once. A label outside the classes raises on the CPU; the
    kernel, which cannot, gives it a loss of nan.
    """
    if has_kernel(logits.device, logits.dtype):
        launch(logits, labels, losses, scale, ignore, smoothing)
    else:
        reference(logits, labels, losses, scale, ignore, smoothing)


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernel serves logits of this device and dtype; it computes in float32."""
    return device.type == "cuda" and dtype != torch.float64


def reference_workspace_nbytes(rows: int, classes: int, dtype: torch.dtype, has_scale: bool) -> int:
    """What `reference` allocates: the softmax with two gradients, or with the logits in its dtype."""
    wide = wide_dtype(dtype)
    return rows * classes * wide.itemsize * (3 if has_scale else 1 if dtype == wide else 2)


def reference(
    logits: Tensor, labels: Tensor, losses: Tensor, scale: Tensor | None, ignore: int, smoothing: float
) -> None:
    """What the kernel computes, in the operators that autograd of torch's loss runs, and in their order."""
    ignored = labels == ignore
    places = labels.masked_fill(ignored, 0)[:, None]
    log_softmax = logits.log_softmax(1, dtype=losses.dtype)
    loss = log_softmax.gather(1, places)[:, 0] * (smoothing - 1)
    if smoothing:
        loss -= log_softmax.mean(1) * smoothing
    losses.copy_(loss.masked_fill_(ignored, 0))
    if scale is None:
        return
    gradient = torch.full_like(log_softmax, -smoothing / logits.shape[1])
    gradient.scatter_add_(1, places, gradient.new_full(places.shape, smoothing - 1))
    gradient.mul_(scale).masked_fill_(ignored[:, None], 0)
    # autograd's own operator: on the CPU the result is then torch's to the bit
    logits.copy_(torch.ops.aten._log_softmax_backward_data(gradient, log_softmax, 1, losses.dtype))


def launch(logits: Tensor, labels: Tensor, losses: Tensor, scale: Tensor | None, ignore: int, smoothing: float) -> None:
    """Run the Triton kernel, on the current stream and without waiting for it; computes in float32."""
    rows, classes = logits.shape
    if not rows:
        return
    with current_device(logits.device):
        _kernel()[(rows,)](
            logits, labels, losses, losses if scale is None else scale, logits.stride(0), ignore, smoothing,
            CLASSES=classes, IS_SMOOTH=smoothing != 0, WRITES=scale is not None, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip


@functools.cache
def _kernel() -> Any:
    global tl
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def cross_entropy(  # type: ignore[no-untyped-def]
        logits_ptr, labels_ptr, losses_ptr, scale_ptr, stride, ignore, smoothing,
        CLASSES: tl.constexpr, IS_SMOOTH: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * stride
        label = tl.load(labels_ptr + row)
        columns = tl.arange(0, BLOCK)
        if label == ignore:
            tl.store(losses_ptr + row, 0.0)
            if WRITES:
                zeros = tl.zeros([BLOCK], tl.float32).to(logits_ptr.dtype.element_ty)
                for begin in range(0, CLASSES, BLOCK):
                    tl.store(logits_ptr + begin + columns, zeros, mask=begin + columns < CLASSES)
        else:
            # lower than any logit but finite: the difference of two infinities would be nan
            maximum = -3.4e38
            denominator = 0.0
            total = 0.0
            for begin in range(0, CLASSES, BLOCK):
                inside = begin + columns < CLASSES
                x = tl.load(logits_ptr + begin + columns, mask=inside, other=float("-inf")).to(tl.float32)
                larger = tl.maximum(maximum, tl.max(x, 0))
                denominator = denominator * tl.exp(maximum - larger) + tl.sum(tl.exp(x - larger), 0)
                maximum = larger
                if IS_SMOOTH:
                    total += tl.sum(tl.where(inside, x, 0.0), 0)
            log_denominator = tl.log(denominator)
            is_class = (label >= 0) & (label < CLASSES)
            chosen = tl.load(logits_ptr + label, mask=is_class, other=float("nan")).to(tl.float32)
            # from the maximum, not from the logarithm of the sum: large logits would cancel
            loss = (1 - smoothing) * (log_denominator - (chosen - maximum))
            if IS_SMOOTH:
                loss += smoothing * (log_denominator - (total / CLASSES - maximum))
            tl.store(losses_ptr + row, loss)
            if WRITES:
                # every thread has read the label's logit before any thread overwrites it
                tl.debug_barrier()
                scale = tl.load(scale_ptr).to(tl.float32)
                for begin in range(0, CLASSES, BLOCK):
                    place = begin + columns
                    inside = place < CLASSES
                    x = tl.load(logits_ptr + place, mask=inside, other=float("-inf")).to(tl.float32)
                    gradient = tl.exp(x - maximum) / denominator - smoothing / CLASSES
                    gradient = (gradient - tl.where(place == label, 1 - smoothing, 0.0)) * scale
                    tl.store(logits_ptr + place, gradient.to(logits_ptr.dtype.element_ty), mask=inside)

    return cross_entropy

"""Runs the head of a model, its projection to the classes and the cross-entropy, a block of tokens at a time.

The logits of a language model are its largest activation (8 x 1024 tokens of 128,256 classes in float32 are
4.2 GB), and only a scalar is wanted of them. These operators hold the logits of one block of tokens at a time.

``linear_cross_entropy(hidden, weight, bias, labels, ignore_index, label_smoothing, mean) -> loss`` is what a model
calls (`head.rewrite` puts it there). ``linear_cross_entropy_backward(tangent, ..., output_mask, start, dim, length,
bias_start, bias_length) -> (d_hidden, d_weight, d_bias)`` is its gradient as autograd records it; it computes the
logits again. ``linear_cross_entropy_grad`` is both in one pass, for a tangent of 1 (`passes.chunk_logits` merges
them), so that logits are computed once.

Shapes: ``hidden`` ``[tokens, features]``, ``weight`` ``[classes, features]``, ``bias`` ``[classes]`` of one dtype,
``labels`` ``i64[tokens]``; ``loss`` is a scalar, float32 (float64 for float64). Of the gradients, ``output_mask``
says which are computed; the others are empty tensors. Of ``d_weight`` only ``length`` indices along ``dim`` from
``start`` (``i64[]`` on the CPU) are computed, all of it where ``start`` is None; ``d_bias`` likewise. Sums over
blocks are taken in float32 and rounded to the weight's dtype once. Meaning of labels, ``ignore_index``, smoothing
and ``mean``: `torch.nn.functional.cross_entropy`. With ``split`` a block is that many times smaller than usual.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import register_flop_formula

from chunkft_fx.graph.layout import wide_dtype
from chunkft_fx.kernels.cross_entropy import softmax_cross_entropy_

# Of one block of logits. At 128,256 classes in bf16 it is 1024 tokens: each block reads the weight once for each
# product, and with 1024 multiplications for each weight read a product stays bound by arithmetic, not by memory
# (an H200 does about 200 a byte).
LOGITS_NBYTES = 2**28
# A block is a multiple of this many tokens where there is room: the widest tile of the library's products.
_TILE = 256


# Splits that plans choose from: every one halves the block of the one before, down to 32 MiB.
SPLITS = (1, 2, 4, 8)


def block_tokens(classes: int, itemsize: int, split: int = 1) -> int:
    """The number of tokens whose logits are held at a time; ``itemsize`` is the bytes of one logit."""
    tokens = max(1, LOGITS_NBYTES // (classes * itemsize * split))
    return tokens - tokens % _TILE if tokens > _TILE else tokens


def useful_splits(tokens: int, classes: int, itemsize: int) -> tuple[int, ...]:
    """The splits, from 1 on, that make each block of so many tokens smaller than the split before."""
    sizes = {min(block_tokens(classes, itemsize, split), tokens): split for split in reversed(SPLITS)}
    return tuple(sorted(sizes.values()))


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    mean: bool,
    output_mask: Sequence[bool] = (False, False, False),
    start: Tensor | None = None,
    dim: int = 0,
    length: int = 0,
    bias_start: Tensor | None = None,
    bias_length: int = 0,
    *,
    tangent: Tensor | None = None,
    split: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients times ``tangent`` (None is 1), in one pass over blocks of tokens."""
    tokens, wide = hidden.shape[0], wide_dtype(hidden.dtype)
    classes, features = weight.shape
    divisor = (labels != ignore_index).sum().to(wide) if mean else torch.ones((), dtype=wide, device=hidden.device)
    scale = divisor.reciprocal() if any(output_mask) else None
    if scale is not None and tangent is not None:
        scale = scale * tangent
    size = min(block_tokens(classes, hidden.element_size(), split), tokens)
    rows = window(start if dim == 0 else None, length, classes)
    columns = window(start if dim == 1 else None, length, features)
    bias_rows = window(bias_start, bias_length, classes)
    d_hidden = hidden.new_empty(hidden.shape if output_mask[0] else 0)
    # one block's product is rounded by itself; several are added up in the wide dtype
    total = weight.dtype if size == tokens else wide
    d_weight = weight.new_zeros((size_of(rows), size_of(columns)) if output_mask[1] else 0, dtype=total)
    d_bias = weight.new_zeros(size_of(bias_rows) if output_mask[2] else 0, dtype=wide)
    losses = hidden.new_empty(tokens, dtype=wide)
    buffer = logits = hidden.new_empty(size, classes)
    for begin in range(0, tokens, size or 1):
        block = slice(begin, min(begin + size, tokens))
        x, logits = hidden[block], buffer[: block.stop - begin]
        project(x, weight, bias, logits)
        softmax_cross_entropy_(logits, labels[block], losses[block], scale, ignore_index, label_smoothing)
        if output_mask[0]:
            torch.mm(logits, weight, out=d_hidden[block])
        if output_mask[1]:
            add_product(d_weight, logits[:, rows], x[:, columns])
        if output_mask[2]:
            d_bias += logits[:, bias_rows].sum(0, dtype=wide)
    del buffer, logits  # both hold the block of logits, whose memory the casts below can use again
    return losses.sum() / divisor, d_hidden, d_weight.to(weight.dtype), d_bias.to(weight.dtype)


def window(start: Tensor | None, length: int, size: int) -> slice:
    if start is None:
        return slice(0, size)
    first = int(start)
    return slice(first, first + length)


def size_of(window: slice) -> int:
    return int(window.stop - window.start)


def project(x: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=logits)
    else:
        torch.addmm(bias, x, weight.t(), out=logits)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += aᵀ b``, summed in the dtype of ``total``."""
    if total.dtype == a.dtype:
        total.addmm_(a.t(), b)
    elif total.is_cuda:
        torch.addmm(total, a.t(), b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype).t(), b.to(total.dtype))


def _forward(*args: Any, split: int = 1) -> Tensor:
    return loss_and_gradients(*args, split=split)[0]


def _backward(tangent: Tensor, *args: Any, split: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    _, d_hidden, d_weight, d_bias = loss_and_gradients(*args, tangent=tangent, split=split)
    return d_hidden, d_weight, d_bias


def _forward_meta(hidden: Tensor, *args: Any, split: int = 1) -> Tensor:
    return hidden.new_empty((), dtype=wide_dtype(hidden.dtype))


def _backward_meta(
    tangent: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    mean: bool,
    output_mask: Sequence[bool],
    start: Tensor | None = None,
    dim: int = 0,
    length: int = 0,
    bias_start: Tensor | None = None,
    bias_length: int = 0,
    *,
    split: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = list(weight.shape)
    rows = sizes[0] if bias_start is None else bias_length
    if start is not None:
        sizes[dim] = length
    return (
        hidden.new_empty(hidden.shape if output_mask[0] else 0),
        weight.new_empty(sizes if output_mask[1] else 0),
        weight.new_empty(rows if output_mask[2] else 0),
    )


def _grad_meta(hidden: Tensor, *args: Any, split: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward_meta(hidden), *_backward_meta(hidden, hidden, *args)


def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings, ctx.split = inputs[4:], keyword_only_inputs["split"]


def _differentiate(ctx: Any, tangent: Tensor) -> tuple[Any, ...]:
    mask = [bool(needed) for needed in ctx.needs_input_grad[:3]]
    gradients = backward(tangent, *ctx.saved_tensors, *ctx.settings, mask, split=ctx.split)
    return (*(g if needed else None for g, needed in zip(gradients, mask, strict=True)), None, None, None, None)


_LIBRARY = torch.library.Library("chunkft_fx", "FRAGMENT")
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index, float label_smoothing, bool mean"
_SPLIT = "*, int split=1"
_WANTED = "bool[3] output_mask, Tensor? start=None, int dim=0, int length=0, Tensor? bias_start=None, int bias_length=0"
for _name, _schema, _function, _meta in (
    ("linear_cross_entropy", f"({_HEAD}, {_SPLIT}) -> Tensor", _forward, _forward_meta),
    (
        "linear_cross_entropy_backward",
        f"(Tensor tangent, {_HEAD}, {_WANTED}, {_SPLIT}) -> (Tensor, Tensor, Tensor)", _backward, _backward_meta,
    ),
    (
        "linear_cross_entropy_grad",
        f"({_HEAD}, {_WANTED}, {_SPLIT}) -> (Tensor, Tensor, Tensor, Tensor)", loss_and_gradients, _grad_meta,
    ),
):  # fmt: skip
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _function, "CPU")
    _LIBRARY.impl(_name, _function, "CUDA")
    torch.library.register_fake(f"chunkft_fx::{_name}", _meta, lib=_LIBRARY)
torch.library.register_autograd("chunkft_fx::linear_cross_entropy", _differentiate, setup_context=_setup, lib=_LIBRARY)

forward = torch.ops.chunkft_fx.linear_cross_entropy.default
backward = torch.ops.chunkft_fx.linear_cross_entropy_backward.default
grad = torch.ops.chunkft_fx.linear_cross_entropy_grad.default


# All operators of chunked heads; `head.log_probs` adds its own.
HEADS: set[Any] = {forward, backward, grad}


def is_head(node: fx.Node) -> bool:
    """Whether a node is an operator of a chunked head."""
    return node.target in HEADS


def product_flops(
    hidden: Sequence[int],
    weight: Sequence[int],
    output_mask: Sequence[bool] = (False, False, False),
    sliced: tuple[int, int] | None = None,
) -> int:
    """Those of the logits, of the input gradient and of the weight gradient, or ``sliced`` of it (length, size)."""
    whole = 2 * hidden[0] * weight[0] * weight[1]
    part = whole if sliced is None else whole * sliced[0] // sliced[1]
    return whole + whole * output_mask[0] + part * output_mask[1]


def _forward_flops(hidden: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return product_flops(hidden, weight)


def _grad_flops(
    hidden: Sequence[int],
    weight: Sequence[int],
    bias: Any,
    labels: Any,
    ignore_index: int,
    label_smoothing: float,
    mean: bool,
    output_mask: Sequence[bool],
    start: Any = None,
    dim: int = 0,
    length: int = 0,
    *args: Any,
    **kwargs: Any,
) -> int:
    return product_flops(hidden, weight, output_mask, None if start is None else (length, weight[dim]))


def _backward_flops(tangent: Any, *args: Any, **kwargs: Any) -> int:
    return _grad_flops(*args, **kwargs)


for _operator, _flops in (
    (torch.ops.chunkft_fx.linear_cross_entropy, _forward_flops),
    (torch.ops.chunkft_fx.linear_cross_entropy_backward, _backward_flops),
    (torch.ops.chunkft_fx.linear_cross_entropy_grad, _grad_flops),
):
    register_flop_formula(_operator)(_flops)

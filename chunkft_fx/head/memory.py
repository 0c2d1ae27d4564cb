"""Predicts what the operators of the chunked head allocate while they run, and the bytes that their blocks move.

The same steps as those of `head.operators` and `head.log_probs`, counted in bytes: all of it is known from shapes and
dtypes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from chunkft_fx.graph.layout import wide_dtype
from chunkft_fx.graph.sizes import AS_TRACED, Sizes
from chunkft_fx.head import log_probs
from chunkft_fx.head import operators as head
from chunkft_fx.head.operators import is_head
from chunkft_fx.kernels.cross_entropy import has_kernel, reference_workspace_nbytes

# Where the input stands among an operator's arguments, and the gradients among its results.
_LAYOUT: dict[Any, tuple[int, slice]] = {
    head.forward: (0, slice(0, 0)),
    head.backward: (1, slice(0, 3)),
    head.grad: (0, slice(1, 4)),
    log_probs.forward: (0, slice(0, 0)),
    log_probs.backward: (2, slice(0, 3)),
}
# How much smaller than usual their blocks are.
_SMALLER: dict[Any, int] = {log_probs.forward: log_probs.SMALLER, log_probs.backward: log_probs.SMALLER}


def head_workspace(node: fx.Node, sizes: Sizes = AS_TRACED) -> int:
    """Bytes that a node of the chunked head allocates at its peak beyond its results; 0 for any other node.

    A product library's own workspace is not counted.
    """
    if not is_head(node):
        return 0
    hidden, weight = operands(node)
    classes = int(weight.shape[0])
    if node.target in _SMALLER:
        return _log_probs_workspace(node, hidden, classes, _gradients(node), _split(node), sizes)
    return _workspace(hidden, classes, _gradients(node), _split(node), sizes)


def useful_splits(node: fx.Node, sizes: Sizes = AS_TRACED) -> tuple[int, ...]:
    """The splits, from 1 on, that make each block of a head's node smaller than the split before."""
    hidden, weight = operands(node)
    smaller = _SMALLER.get(node.target, 1)
    return head.useful_splits(sizes.of(hidden.shape[0]), int(weight.shape[0]), hidden.element_size() * smaller)


def blocks(node: fx.Node, sizes: Sizes = AS_TRACED) -> int:
    """How many blocks of tokens a node of the chunked head works through; 1 for any other node."""
    if not is_head(node):
        return 1
    hidden, weight = operands(node)
    size = head.block_tokens(int(weight.shape[0]), hidden.element_size(), _split(node))
    return -(-sizes.of(hidden.shape[0]) // size)


def repeated_nbytes(node: fx.Node, sizes: Sizes = AS_TRACED) -> int:
    """Bytes that each block of tokens but the first moves again: the weight, read for each product, and sums for it."""
    if not is_head(node):
        return 0
    _, weight = operands(node)
    products = sum(weight.nbytes for g in _gradients(node)[:1] if g.ndim == 2) + weight.nbytes
    sums = sum(2 * g.numel() * wide_dtype(g.dtype).itemsize for g in _gradients(node)[1:2])
    return (blocks(node, sizes) - 1) * (products + sums)


def operands(node: fx.Node) -> tuple[Tensor, Tensor]:
    """The values of a head's hidden states ``[tokens, features]`` and of its weight ``[classes, features]``."""
    first, _ = _LAYOUT[node.target]
    values: Any = fx.map_arg(node.args[first : first + 2], lambda n: n.meta["val"])
    return values[0], values[1]


def _gradients(node: fx.Node) -> list[Tensor]:
    results = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else ()
    return list(results[_LAYOUT[node.target][1]])


def _split(node: fx.Node) -> int:
    split: Any = node.kwargs.get("split", 1)
    return int(split) * _SMALLER.get(node.target, 1)


def _workspace(hidden: Tensor, classes: int, gradients: list[Tensor], split: int, sizes: Sizes) -> int:
    tokens, itemsize, wide = sizes.of(hidden.shape[0]), hidden.element_size(), wide_dtype(hidden.dtype)
    size = min(head.block_tokens(classes, itemsize, split), tokens)
    losses, buffer = tokens * wide.itemsize, size * classes * itemsize
    is_fused = has_kernel(hidden.device, hidden.dtype)
    in_block = 0 if is_fused else reference_workspace_nbytes(size, classes, hidden.dtype, bool(gradients))
    return losses + _blocks_nbytes(hidden, gradients, size, tokens, buffer, in_block)


def _log_probs_workspace(
    node: fx.Node, hidden: Tensor, classes: int, gradients: list[Tensor], split: int, sizes: Sizes
) -> int:
    tokens, itemsize, wide = sizes.of(hidden.shape[0]), hidden.element_size(), wide_dtype(hidden.dtype)
    size = min(head.block_tokens(classes, itemsize, split), tokens)
    has_slope = bool(gradients) and node.args[7] is not None
    # scores, where they do not take the logits' place, their softmax, and the slope of a cap
    copies = (hidden.dtype != wide) + 1 + has_slope
    in_block = copies * size * classes * wide.itemsize
    return _blocks_nbytes(hidden, gradients, size, tokens, size * classes * itemsize, in_block)


def _blocks_nbytes(hidden: Tensor, gradients: list[Tensor], size: int, tokens: int, buffer: int, in_block: int) -> int:
    """Bytes beside the results, in blocks of ``size`` tokens: the buffer of logits, and what a block has beside it."""
    wide = wide_dtype(hidden.dtype)
    if not gradients:
        return buffer + in_block
    _, d_weight, d_bias = gradients
    # sums in a wider dtype than the result are alive beside the result at the end
    weight_sum = d_weight.nbytes if size == tokens else d_weight.numel() * wide.itemsize
    bias_sum = d_bias.numel() * wide.itemsize
    early = weight_sum - d_weight.nbytes + bias_sum - d_bias.nbytes
    late = sum(n for n, g in ((weight_sum, d_weight), (bias_sum, d_bias)) if n != g.nbytes)
    if size < tokens and d_weight.ndim == 2:
        in_block = max(in_block, _product_workspace(d_weight, size, hidden, wide))
    return max(buffer + max(in_block, bias_sum) + early, late)


def _product_workspace(d_weight: Tensor, size: int, hidden: Tensor, wide: torch.dtype) -> int:
    """Bytes of the widened factors, where a library cannot add a product of low precision to a wide sum."""
    if hidden.is_cuda or hidden.dtype == wide:
        return 0
    return size * sum(int(n) for n in d_weight.shape) * wide.itemsize

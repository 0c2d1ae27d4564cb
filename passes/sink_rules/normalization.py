"""Decides how slices move through normalisation backwards: weight and bias gradients, for a slice of the channels.

A rule is called only where nobody needs the input gradient (result 0) that the same operator computes; otherwise
the whole weight gradient, one value a channel, is computed with it at no cost, and sliced afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from chunkft_fx.graph.layout import wide_dtype
from chunkft_fx.graph.rewrite import same, shape
from chunkft_fx.passes.sink_rules.table import Cut, Refused, rule

aten = torch.ops.aten


def _wide(cut: Cut, x: fx.Node, like: fx.Node) -> fx.Node:
    """The value in the precision in which normalisation kernels sum: float32 for low-precision inputs."""
    dtype = wide_dtype(x.meta["val"].dtype)
    return x if x.meta["val"].dtype == dtype else cut.emit(aten._to_copy.default, x, like=like, dtype=dtype)


def _sum(cut: Cut, x: fx.Node, keep: int, item: fx.Node) -> fx.Node:
    """Sum over all dimensions but one, in the dtype that the operator's own result had."""
    over = [d for d in range(len(shape(x))) if d != keep]
    total = cut.emit(aten.sum.dim_IntList, x, over, like=item) if over else x
    dtype = _result(item).dtype
    return total if total.meta["val"].dtype == dtype else cut.emit(aten._to_copy.default, total, like=item, dtype=dtype)


def _result(item: fx.Node) -> Tensor:
    value = item.meta["val"]
    assert isinstance(value, Tensor)
    return value


@rule(aten.native_layer_norm_backward.default, contracts=True)
def layer_norm(cut: Cut, item: fx.Node) -> fx.Node:
    """Weight (result 1) or bias (result 2) gradient ``[channels]``, where only the last dimension is normalised."""
    node = item.all_input_nodes[0]
    gradient, x, normalized, mean, rstd, *_ = node.args
    if len(normalized) != 1:  # type: ignore[arg-type]
        raise Refused("the layer norm normalises several dimensions", node)
    last = len(shape(x)) - 1  # type: ignore[arg-type]
    dy = _wide(cut, cut.take(gradient, last), item)
    if item.args[1] == 2:
        return _sum(cut, dy, last, item)
    centred = cut.emit(aten.sub.Tensor, _wide(cut, cut.take(x, last), item), mean, like=item)
    scaled = cut.emit(aten.mul.Tensor, centred, rstd, like=item)
    return _sum(cut, cut.emit(aten.mul.Tensor, dy, scaled, like=item), last, item)


@rule(aten._fused_rms_norm_backward.default, contracts=True)
def rms_norm(cut: Cut, item: fx.Node) -> fx.Node:
    """Weight gradient (result 1) ``[channels]``, where only the last dimension is normalised."""
    node = item.all_input_nodes[0]
    gradient, x, normalized, rstd, *_ = node.args
    if len(normalized) != 1:  # type: ignore[arg-type]
        raise Refused("the RMS norm normalises several dimensions", node)
    last = len(shape(x)) - 1  # type: ignore[arg-type]
    dy = _wide(cut, cut.take(gradient, last), item)
    scaled = cut.emit(aten.mul.Tensor, _wide(cut, cut.take(x, last), item), rstd, like=item)
    return _sum(cut, cut.emit(aten.mul.Tensor, dy, scaled, like=item), last, item)


@rule(aten.native_group_norm_backward.default, contracts=True)
def group_norm(cut: Cut, item: fx.Node) -> fx.Node:
    """Weight (result 1) or bias (result 2) gradient ``[channels]``; channels are dimension 1 of the input."""
    node = item.all_input_nodes[0]
    gradient, x, mean, rstd, _, n, channels, _, groups, _ = node.args
    if not isinstance(channels, int) or not isinstance(groups, int):
        raise Refused("the number of channels is known at run time only", node)
    rank = len(shape(x))  # type: ignore[arg-type]
    dy = _wide(cut, cut.take(gradient, 1), item)
    if item.args[1] == 2:
        return _sum(cut, dy, 1, item)

    def per_channel(statistic: Any) -> fx.Node:
        """``[n, groups]`` to the slice's ``[n, length, 1, ...]``."""
        column = cut.emit(aten.unsqueeze.default, statistic, 2, like=item)
        spread = cut.emit(aten.expand.default, column, [-1, -1, channels // groups], like=item)
        flat = cut.emit(aten.reshape.default, spread, [n, channels], like=item)
        part = cut.take(flat, 1)
        return cut.emit(aten.reshape.default, part, [n, cut.length] + [1] * (rank - 2), like=item)

    centred = cut.emit(aten.sub.Tensor, _wide(cut, cut.take(x, 1), item), per_channel(mean), like=item)
    scaled = cut.emit(aten.mul.Tensor, centred, per_channel(rstd), like=item)
    return _sum(cut, cut.emit(aten.mul.Tensor, dy, scaled, like=item), 1, item)


@rule(aten.native_batch_norm_backward.default, contracts=True)
def batch_norm(cut: Cut, item: fx.Node) -> fx.Node:
    """Weight (result 1) or bias (result 2) gradient ``[channels]`` of a batch norm in training."""
    node = item.all_input_nodes[0]
    gradient, x, _, _, _, mean, invstd, train, *_ = node.args
    if not train or mean is None or not same(shape(mean)[0], shape(x)[1]):  # type: ignore[arg-type]
        raise Refused("the batch norm uses running statistics, so that it saves none of the batch", node)
    rank = len(shape(x))  # type: ignore[arg-type]
    dy = _wide(cut, cut.take(gradient, 1), item)
    if item.args[1] == 2:
        return _sum(cut, dy, 1, item)

    def per_channel(statistic: Any) -> fx.Node:
        return cut.emit(aten.reshape.default, cut.take(statistic, 0), [cut.length] + [1] * (rank - 2), like=item)

    centred = cut.emit(aten.sub.Tensor, _wide(cut, cut.take(x, 1), item), per_channel(mean), like=item)
    scaled = cut.emit(aten.mul.Tensor, centred, per_channel(invstd), like=item)
    return _sum(cut, cut.emit(aten.mul.Tensor, dy, scaled, like=item), 1, item)

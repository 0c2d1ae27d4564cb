"""Runs a head that gives each token's log-probability, a block of logits at a time, and what else is told of a token.

Losses over log-probabilities (preferences, policy gradients, weighted tokens) are made by their trainers, so a head
cannot give one number as in `head.operators`. Logits are computed again for the gradients.

``token_log_probs(hidden, weight, bias, labels, scale, softcap, wanted)`` gives for each token, float32 (float64 for
float64), of the distribution by ``z = scale * (hidden @ weight.T + bias)``, or ``softcap * tanh(z / softcap)`` of it:
the log-probability of its label; the entropy; ``log(sum(p ** 2))``; the mean of z; and whether no class is above the
label (bool). ``wanted`` says which of the last four are computed, the others are empty. The first two have gradients,
by ``token_log_probs_backward(d_log_probs, d_entropy, hidden, ..., softcap, output_mask, start, dim, length,
bias_start, bias_length) -> (d_hidden, d_weight, d_bias)``, whose arguments from ``hidden`` on have the shapes and the
meaning that they have in `head.operators`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from chunkft_fx.graph.layout import wide_dtype
from chunkft_fx.head.operators import HEADS, add_product, block_tokens, product_flops, project, size_of, window

# A block is that much smaller than one of `head.operators`: scores and softmax stand beside its logits in float32.
SMALLER = 4


def _blocks(hidden: Tensor, weight: Tensor, split: int) -> list[slice]:
    size = block_tokens(int(weight.shape[0]), hidden.element_size(), SMALLER * split)
    tokens = hidden.shape[0]
    return [slice(begin, min(begin + size, tokens)) for begin in range(0, tokens, size)]


def _scores(
    x: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """The scores of a block in the wide dtype: in the place of the logits where that is theirs."""
    project(x, weight, bias, logits)
    scores = logits.to(wide_dtype(logits.dtype))
    if scale != 1:
        scores.mul_(scale)
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    wanted: Sequence[bool],
    *,
    split: int = 1,
) -> tuple[Tensor, ...]:
    results = _forward_meta(hidden, weight, bias, labels, scale, softcap, wanted)
    log_probs, entropy, squares, mean, is_top = results
    blocks = _blocks(hidden, weight, split)
    buffer = hidden.new_empty(blocks[0].stop if blocks else 0, weight.shape[0])
    for block in blocks:
        scores = _scores(hidden[block], weight, bias, buffer[: block.stop - block.start], scale, softcap)
        label, maximum = labels[block, None], scores.amax(1, keepdim=True)
        if wanted[2]:
            mean[block] = scores.mean(1)
        scores.sub_(maximum)
        if wanted[3]:
            is_top[block] = scores.argmax(1) == label[:, 0]
        exp = scores.exp()
        total = exp.sum(1)
        log_probs[block] = scores.gather(1, label)[:, 0] - total.log()
        if wanted[1]:
            squares[block] = 2 * (torch.linalg.vector_norm(exp, dim=1).log() - total.log())
        if wanted[0]:
            entropy[block] = total.log() - exp.mul_(scores).sum(1) / total
        del scores, exp  # before the next block's
    return results


def _backward(
    d_log_probs: Tensor,
    d_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    output_mask: Sequence[bool],
    start: Tensor | None = None,
    dim: int = 0,
    length: int = 0,
    bias_start: Tensor | None = None,
    bias_length: int = 0,
    *,
    split: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(hidden.dtype)
    classes, features = weight.shape
    rows = window(start if dim == 0 else None, length, classes)
    columns = window(start if dim == 1 else None, length, features)
    bias_rows = window(bias_start, bias_length, classes)
    blocks = _blocks(hidden, weight, split)
    total = weight.dtype if len(blocks) < 2 else wide
    d_hidden = hidden.new_empty(hidden.shape if output_mask[0] else 0)
    d_weight = weight.new_zeros((size_of(rows), size_of(columns)) if output_mask[1] else 0, dtype=total)
    d_bias = weight.new_zeros(size_of(bias_rows) if output_mask[2] else 0, dtype=wide)
    buffer = logits = hidden.new_empty(blocks[0].stop if blocks else 0, classes)
    for block in blocks:
        x, logits = hidden[block], buffer[: block.stop - block.start]
        scores = _scores(x, weight, bias, logits, scale, softcap)
        d_entropies = None if d_entropy is None else d_entropy[block, None]
        gradient = _score_gradients(scores, labels[block, None], d_log_probs[block, None], d_entropies, scale, softcap)
        logits.copy_(gradient)
        del scores, gradient
        if output_mask[0]:
            torch.mm(logits, weight, out=d_hidden[block])
        if output_mask[1]:
            add_product(d_weight, logits[:, rows], x[:, columns])
        if output_mask[2]:
            d_bias += logits[:, bias_rows].sum(0, dtype=wide)
    del buffer, logits
    return d_hidden, d_weight.to(weight.dtype), d_bias.to(weight.dtype)


def _score_gradients(
    scores: Tensor, labels: Tensor, tangent: Tensor, of_entropy: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """The gradients of a block's products, from its scores, which are overwritten.

    With ``p`` the softmax and ``H`` the entropy, those of the scores are ``tangent * (onehot(label) - p)`` and
    ``-of_entropy * p * (log(p) + H)``.
    """
    slope = None if softcap is None else scores.div(softcap).square_().neg_().add_(1)
    scores.sub_(scores.amax(1, keepdim=True))
    p = scores.exp()
    total = p.sum(1, keepdim=True)
    p.div_(total)
    if of_entropy is None:
        p.mul_(-tangent)
    else:
        products = scores.sub_(total.log()).mul_(p)  # p log(p)
        entropy = -products.sum(1, keepdim=True)
        p.mul_(-(tangent + of_entropy * entropy)).sub_(products.mul_(of_entropy))
    p.scatter_add_(1, labels, tangent)
    if slope is not None:
        p.mul_(slope)
    return p if scale == 1 else p.mul_(scale)


def _forward_meta(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    wanted: Sequence[bool],
    *,
    split: int = 1,
) -> tuple[Tensor, ...]:
    tokens, wide = hidden.shape[0], wide_dtype(hidden.dtype)
    dtypes = (wide, wide, wide, torch.bool)
    more = [hidden.new_empty(tokens if w else 0, dtype=d) for w, d in zip(wanted, dtypes, strict=True)]
    return hidden.new_empty(tokens, dtype=wide), *more


def _backward_meta(
    d_log_probs: Tensor,
    d_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float | None,
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


def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
    *operands, scale, softcap, wanted = inputs
    ctx.save_for_backward(*operands)
    ctx.settings, ctx.split, ctx.has_entropy = (scale, softcap), keyword_only_inputs["split"], wanted[0]
    ctx.mark_non_differentiable(*output[1 + wanted[0] :])


def _differentiate(ctx: Any, tangent: Tensor, of_entropy: Tensor, *_: Any) -> tuple[Any, ...]:
    mask = [bool(needed) for needed in ctx.needs_input_grad[:3]]
    of_entropy_or_none = of_entropy if ctx.has_entropy else None
    found = backward(tangent, of_entropy_or_none, *ctx.saved_tensors, *ctx.settings, mask, split=ctx.split)
    return (*(g if needed else None for g, needed in zip(found, mask, strict=True)), None, None, None, None)


_LIBRARY = torch.library.Library("chunkft_fx", "FRAGMENT")
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float scale, float? softcap"
_ASKED = "bool[3] output_mask, Tensor? start=None, int dim=0, int length=0, Tensor? bias_start=None, int bias_length=0"
for _name, _schema, _function, _meta in (
    (
        "token_log_probs",
        f"({_HEAD}, bool[4] wanted, *, int split=1) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _forward, _forward_meta,
    ),
    (
        "token_log_probs_backward",
        f"(Tensor d_log_probs, Tensor? d_entropy, {_HEAD}, {_ASKED}, *, int split=1) -> (Tensor, Tensor, Tensor)",
        _backward, _backward_meta,
    ),
):  # fmt: skip
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _function, "CPU")
    _LIBRARY.impl(_name, _function, "CUDA")
    torch.library.register_fake(f"chunkft_fx::{_name}", _meta, lib=_LIBRARY)
torch.library.register_autograd("chunkft_fx::token_log_probs", _differentiate, setup_context=_setup, lib=_LIBRARY)

forward = torch.ops.chunkft_fx.token_log_probs.default
backward = torch.ops.chunkft_fx.token_log_probs_backward.default
HEADS.update((forward, backward))


def _forward_flops(hidden: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return product_flops(hidden, weight)


def _backward_flops(
    d_log_probs: Any,
    d_entropy: Any,
    hidden: Sequence[int],
    weight: Sequence[int],
    bias: Any,
    labels: Any,
    scale: float,
    softcap: float | None,
    output_mask: Sequence[bool],
    start: Any = None,
    dim: int = 0,
    length: int = 0,
    *args: Any,
    **kwargs: Any,
) -> int:
    return product_flops(hidden, weight, output_mask, None if start is None else (length, weight[dim]))


register_flop_formula(torch.ops.chunkft_fx.token_log_probs)(_forward_flops)
register_flop_formula(torch.ops.chunkft_fx.token_log_probs_backward)(_backward_flops)

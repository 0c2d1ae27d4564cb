"""What operators do to a batch that is split: those with a rule give the same, mixed samples are refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from chunkft_fx.errors import BudgetInfeasible
from tests.support.split_twin import Function, check_split

BATCH = 4


def batch(*shape: int) -> Tensor:
    """Values of four samples."""
    return torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


# By what they show: a function of the weight and a batch of [4, 6, 6], all of whose values depend on both.
SPLITS: dict[str, Function] = {
    "broadcast": lambda w, x: torch.tanh(x @ w) * w + x.transpose(1, 2) / 3 - 1,
    "where": lambda w, x: torch.where(x > 0, x @ w, w[0]).clamp(min=-0.5),
    "masked_fill": lambda w, x: (x @ w).masked_fill(x < 0, 2.0),
    "merged_with_tokens": lambda w, x: ((x @ w).view(-1, 6) @ w).view(x.shape).softmax(-1),
    "merged_and_divided": lambda w, x: (x @ w).reshape(-1, 9).view(x.shape[0], 2, 18).cumsum(2),
    "batch_in_the_middle": lambda w, x: (x @ w).transpose(0, 1).relu().permute(2, 1, 0).contiguous().flatten(1),
    "attention_by_hand": lambda w, x: torch.softmax((x @ w) @ x.transpose(1, 2) / 6**0.5, -1) @ x,
    "attention": lambda w, x: functional.scaled_dot_product_attention(*(((x @ w)[:, None],) * 3), is_causal=True),
    "attention_with_mask": lambda w, x: functional.scaled_dot_product_attention(
        *(((x @ w)[:, None],) * 3), attn_mask=x[:, None]
    ),
    "attention_with_one_mask": lambda w, x: functional.scaled_dot_product_attention(
        *(((x @ w)[:, None],) * 3), attn_mask=w
    ),
    "layer_norm": lambda w, x: functional.layer_norm(x @ w, (6,), w[0], w[1]),
    "rms_norm": lambda w, x: functional.rms_norm(x @ w, (6,), w[0]),
    "group_norm": lambda w, x: functional.group_norm(x @ w, 3, w[0], w[1]),
    "batch_norm_by_statistics": lambda w, x: functional.batch_norm(x @ w, x.new_ones(6), x.new_ones(6), w[2], w[3]),
    "convolution": lambda w, x: functional.conv1d(x, w[:, :3, None].expand(6, 3, 2), padding=1, groups=2),
    "pooling": lambda w, x: functional.max_pool2d((x @ w)[:, None], 2) + functional.avg_pool2d((x @ w)[:, None], 2),
    "interpolation": lambda w, x: functional.interpolate((x @ w)[:, None], scale_factor=2, mode="bilinear"),
    "reductions_of_samples": lambda w, x: [(x @ w).amax(1), (x @ w).var(-1), (x @ w).logsumexp(2, keepdim=True)],
    "sorted_samples": lambda w, x: [*(x @ w).sort(-1), *(x @ w).topk(2, 1), (x @ w).flip(1).roll(1, 2)],
    "first_token": lambda w, x: [(x @ w)[:, 0], (x @ w)[..., 1:], (x @ w)[:, [1, 3, 5]]],
    "own_token": lambda w, x: (x @ w)[torch.arange(x.shape[0]), x[:, 0].argmax(-1)],
    "own_tokens": lambda w, x: (x @ w)[torch.arange(x.shape[0])[:, None], x.argmax(-1)],
    "gathered": lambda w, x: (x @ w).gather(2, x.argsort(-1)),
    "scattered": lambda w, x: torch.zeros_like(x).scatter_add(2, x.argsort(-1), x @ w),
    "look_up": lambda w, x: w[x[:, 0].argsort(-1)] * w.gather(1, x.argsort(-1)[:, 0].t()).t()[:, :, None],
    "look_up_of_rows": lambda w, x: w.index_select(0, x[:, 0].argmax(-1)),
    "joined": lambda w, x: torch.cat([x @ w, x, torch.empty(0, dtype=x.dtype)], 1),
    "stacked": lambda w, x: torch.stack([x @ w, x], 1),
    "divided": lambda w, x: [*(x @ w).chunk(2, -1), *x.split([1, 5], 1)],
    "taken_apart": lambda w, x: sum(part * i for i, part in enumerate((x @ w).unbind(1))),
    "repeated": lambda w, x: (x @ w).repeat(1, 2, 1) + w.repeat(x.shape[0], 2, 1),
    "expanded": lambda w, x: w[None].expand(x.shape[0], -1, -1).bmm(x),
    "padded": lambda w, x: functional.pad(x @ w, (1, 0, 0, 2), value=3.0),
    "triangles": lambda w, x: (x @ w).tril() + x.triu(1) + (x @ w).diagonal(dim1=1, dim2=2)[..., None],
    "windows": lambda w, x: (x @ w).unfold(2, 3, 1).prod(-1),
    "constants": lambda w, x: (x @ w) * x.new_ones(x.shape[0], 1, 6) + torch.zeros(x.shape[0], 6, 1, dtype=x.dtype),
    "written_in_place": lambda w, x: _written(w, x),
    "same_sample": lambda w, x: _same_sample(w, x),
    "fft": lambda w, x: torch.fft.fft(x @ w, dim=-1).real,
    "rotations": lambda w, x: torch.view_as_real(torch.view_as_complex((x @ w).view(*x.shape[:2], 3, 2)) * 1j),
    "sum": lambda w, x: (x @ w).square().sum(),
    "mean": lambda w, x: 3 * (x @ w).square().mean() + w.square().sum(),
    "mean_of_sums": lambda w, x: (x @ w).square().sum((1, 2)).mean() / 2,
    "sum_by_size": lambda w, x: -(x @ w).square().sum() / x.shape[0] + (x @ w).mean(),
    "sum_times_share": lambda w, x: (x @ w).square().sum() * (1 / x.shape[0]),
    "product_over_samples": lambda w, x: (x @ w).flatten(1).t() @ x.flatten(1),
    "sum_over_the_batch": lambda w, x: (x @ w).mean(0) * w[0] - (x @ w).sum(0) / x.shape[0],
    "masked_mean": lambda w, x: ((x @ w).square() * (x > 1)).sum() / (x > 1).sum(),
    "clamped_mean": lambda w, x: ((x @ w).square() * (x > 9)).sum() / (x > 9).sum().clamp(min=1),
    "any_of_the_batch": lambda w, x: torch.where((x > 2).any(), x @ w, x) + x.amax(),
    "mse": lambda w, x: functional.mse_loss(x @ w, x),
    "smooth": lambda w, x: functional.smooth_l1_loss(x @ w, x) + functional.huber_loss(x @ w, x),
    "binary": lambda w, x: functional.binary_cross_entropy_with_logits(x @ w, (x > 0).double()),
    "no_reduction": lambda w, x: functional.mse_loss(x @ w, x, reduction="none"),
}


def _written(w: Tensor, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = (x @ w)[:, :-1]
    y[:, 0] = w[0]
    return y


def _same_sample(w: Tensor, x: Tensor) -> Tensor:
    """A mask by numbers of samples, as masks of packed sequences have them."""
    numbers = torch.arange(x.shape[0])[:, None, None].expand(-1, 6, 6)
    return (x @ w) * (numbers == numbers.transpose(1, 2))


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SPLITS)
def test_values_and_gradients_are_those_of_the_whole(name: str, parts: int) -> None:
    check_split(SPLITS[name], [batch(6, 6)], parts)


@torch.library.custom_op("chunkft_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    """An operator of a user's, whose gradient is not that of its values."""
    return x * 2


@doubled.register_fake
def _doubled_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


doubled.register_autograd(lambda ctx, gradient: gradient / gradient.norm())


REFUSED: dict[str, tuple[Function, str]] = {
    "centred": (lambda w, x: (x @ w) - (x @ w).mean(0), "adds a sum over the batch's samples to each of them"),
    "contrast": (lambda w, x: torch.softmax((x @ w).flatten(1) @ x.flatten(1).t(), -1).diagonal(), "brings different"),
    "softmax": (lambda w, x: (x @ w).softmax(0), "aten._softmax.default .*looks at all samples"),
    "rolled": (lambda w, x: (x @ w).roll(1, 0), "another order"),
    "turned": (lambda w, x: (x @ w).flip(0), "another order"),
    "summed_up": (lambda w, x: (x @ w).cumsum(0), "looks at all samples"),
    "summed_up_merged": (lambda w, x: (x @ w).view(-1, 6).cumsum(0), "merged with"),
    "largest": (lambda w, x: (x @ w).amax(), "looks at all samples"),
    "batch_norm": (lambda w, x: functional.batch_norm(x @ w, None, None, training=True), "normalises over"),
    "norm_of_the_batch": (lambda w, x: functional.layer_norm(x @ w, (4, 6, 6)[-3:]), "shape|normalises over"),
    "first_sample": (lambda w, x: (x @ w)[0], "takes one of the batch's samples"),
    "first_samples": (lambda w, x: (x @ w)[:1], "takes some of the batch's samples"),
    "neighbour": (lambda w, x: (x @ w)[torch.arange(x.shape[0]) - 1], "numbers of the batch's samples"),
    "all_pairs": (lambda w, x: (x @ w)[:, None] - x[None], "different samples"),
    "flattened_inwards": (lambda w, x: (x @ w).transpose(0, 1).reshape(-1, 6).relu(), "outside of them"),
    "joined_samples": (lambda w, x: torch.cat([x @ w, x], 0), "joins samples"),
    "divided_batch": (lambda w, x: (x @ w).chunk(2)[0], "divides the batch|has as many|takes"),
    "shared_draw": (lambda w, x: (x @ w) * torch.rand(6, dtype=x.dtype), "all samples of the batch share"),
    "by_size": (lambda w, x: (x @ w) * x.shape[0], "scales each sample"),
    "counted": (lambda w, x: (x @ w) + torch.arange(x.shape[0])[:, None, None], "numbers of the batch's samples"),
    "square_of_sum": (lambda w, x: (x @ w).sum().square(), "not linear"),
    "product_of_sums": (lambda w, x: (x @ w).sum() * x.sum() * (x @ w).mean(), "multiplies a sum"),
    "two_kinds": (lambda w, x: (x @ w).mean() + ((x @ w) * (x > 0)).sum() / (x > 0).sum(), "divided otherwise"),
    "sum_and_weight": (lambda w, x: (x @ w).sum() + w.square().sum(), "does not depend on the batch"),
    "learned_count": (lambda w, x: (x @ w).sum() / (x @ w).sigmoid().sum(), "depends on the weights"),
    "repeated_samples": (lambda w, x: (x @ w).repeat(2, 1, 1), "repeats the batch"),
    "padded_batch": (lambda w, x: functional.pad(x @ w, (0, 0, 0, 0, 1, 0)), "adds samples"),
    "triangle_of_batch": (lambda w, x: (x @ w)[:, 0].tril(), "another part of each"),
    "windows_of_samples": (lambda w, x: (x @ w).unfold(0, 2, 1), "several of the batch's samples"),
    "table_as_long_as_the_batch": (lambda w, x: (x @ w) + w[:4, :, None], "as many values as the batch|shape"),
    "other_function": (lambda w, x: (x @ w) if x.shape[0] > 3 else torch.tanh(x @ w), "another path"),
    "rows_by_size": (lambda w, x: (x @ w) * w[: x.shape[0], :1, None], "depends on the size of the batch"),
    "cut_off": (lambda w, x: (x @ w) if x.shape[0] > 3 else (x @ w).detach() + 0 * w.sum(), "another path"),
    "swapped": (
        lambda w, x: (x @ w).detach() * x.matmul(w) if x.shape[0] > 3 else _swapped(w, x),
        "another path",
    ),
    "own_operator": (lambda w, x: doubled(x @ w), "not torch's own"),
    "own_operator_on_weights": (lambda w, x: x @ doubled(w), "not torch's own"),
    "linear_algebra": (lambda w, x: torch.linalg.det(x @ w), "no rule"),
    "any_sample": (lambda w, x: (x @ w > 0).sum(dtype=torch.bool) * w.sum(), "samples in torch.bool"),
    "wrapped": (lambda w, x: (x @ w < 99).sum(dtype=torch.uint8).double() * w.sum(), "samples in torch.uint8"),
    "narrowed": (lambda w, x: [(x @ w).sum(), (x @ w > 0).sum().int()], "samples in torch.int32"),
    "rounded": (lambda w, x: [(x @ w).sum(), (x @ w).sum().long()], "rounds a sum"),
    "numbers": (lambda w, x: [(x @ w).sum(), torch.arange(x.shape[0])], "returns the numbers"),
}


def _swapped(w: Tensor, x: Tensor) -> Tensor:
    y = x @ w
    return y.detach() * y


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_samples_is_refused_by_name(name: str) -> None:
    function, reason = REFUSED[name]
    with pytest.raises(BudgetInfeasible, match=rf"no room.*not split into micro-batches, because .*({reason})"):
        check_split(function, [batch(6, 6)], 2)


def test_the_line_is_told() -> None:
    with pytest.raises(BudgetInfeasible, match=r"test_rules.py, line \d+: .*roll\(1, 0\)"):
        check_split(REFUSED["rolled"][0], [batch(6, 6)], 2)

"""Losses of a batch that is split, above all means over the labels that count, of which parts have uneven numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from chunkft_fx.errors import BudgetInfeasible
from tests.splitting.test_rules import batch
from tests.support.split_twin import Function, check_split

IGNORED = -100
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.1, 3.0, 1.5], dtype=torch.float64)


def _entropy(**options: Any) -> Function:
    """The cross-entropy of tokens, by a head that this library runs in blocks."""

    def loss(w: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(functional.linear(x, w).flatten(0, 1), labels.flatten(), **options)

    return loss


def _plain_entropy(**options: Any) -> Function:
    """The same of scores that no head makes."""

    def loss(w: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(torch.tanh(x @ w).flatten(0, 1), labels.flatten(), **options)

    return loss


def _shifted(w: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """As causal models have it: each label is the token before's."""
    labels = functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous()
    return functional.cross_entropy(functional.linear(x, w).float().view(-1, 6).double(), labels.view(-1))


def _masked(w: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    mask = labels != IGNORED
    losses = functional.cross_entropy((x @ w).transpose(1, 2), labels, reduction="none")
    return (losses * mask).sum() / mask.sum().clamp(min=1)


def _of_samples(w: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """The mean of the samples' means."""
    mask = labels != IGNORED
    losses = functional.cross_entropy((x @ w).transpose(1, 2), labels, reduction="none")
    return ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def _given_number(w: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    return _entropy(reduction="sum")(w, x, labels) / torch.tensor(7)


def _two_tasks(w: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    return _entropy()(w, x, labels) + 0.3 * _plain_entropy()(w, x, labels.flip(1))


LOSSES: dict[str, Function] = {
    "head": _entropy(),
    "head_smoothed": _entropy(label_smoothing=0.1),
    "head_sum": _entropy(reduction="sum"),
    "head_other_label": lambda w, x, labels: _entropy(ignore_index=2)(w, x, labels.clamp(min=0)),
    "plain": _plain_entropy(),
    "plain_sum": _plain_entropy(reduction="sum"),
    "plain_weighted": _plain_entropy(weight=WEIGHTS),
    "plain_each": _plain_entropy(reduction="none"),
    "images": lambda w, x, labels: functional.cross_entropy(
        torch.tanh(x @ w).transpose(1, 2).unflatten(2, (2, 3)), labels.unflatten(1, (2, 3))
    ),
    "shifted": _shifted,
    "masked": _masked,
    "of_samples": _of_samples,
    "given_number": _given_number,
    "two_tasks": _two_tasks,
}


def _labels(seed: int, ignored: tuple[int, ...]) -> Tensor:
    """Labels of four samples, of which some count for nothing at all, and others here and there."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 6, (4, 6), generator=generator)
    labels[torch.rand(4, 6, generator=generator) < torch.rand(4, 1, generator=generator)] = IGNORED
    labels[list(ignored)] = IGNORED
    return labels


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None, max_examples=4)
@given(data=st.data())
def test_losses_are_those_of_the_whole(name: str, data: st.DataObject) -> None:
    """Also with parts whose labels are all ignored, and where all are: then torch's loss is not a number."""
    ignored = data.draw(st.sampled_from([(), (1,), (0, 1), (2, 3), (0, 1, 2, 3)]))
    labels = _labels(data.draw(st.integers(0, 99)), ignored)
    check_split(LOSSES[name], [batch(6, 6), labels], data.draw(st.sampled_from([2, 4])))


REFUSED: dict[str, tuple[Function, str]] = {
    "a_mean_beside_one_over_labels": (
        lambda w, x, labels: _entropy()(w, x, labels) + (x @ w).square().mean(),
        "a mean over the batch's samples to a sum that is divided otherwise",
    ),
    "labels_of_the_first_sample": (
        lambda w, x, labels: _plain_entropy()(w, x, labels[:1].expand(x.shape[0], -1)),
        "takes some of the batch's samples",
    ),
    "labels_by_weights": (
        lambda w, x, labels: _plain_entropy()(w, x, (x @ w).argmax(-1)),
        "counts labels that depend on the weights",
    ),
    "every_second_label": (
        lambda w, x, labels: _plain_entropy()(w, x, labels.roll(1, 0)),
        "another order",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_losses_that_are_not_split(name: str) -> None:
    function, reason = REFUSED[name]
    with pytest.raises(BudgetInfeasible, match=reason):
        check_split(function, [batch(6, 6), _labels(0, ())], 2)

"""Computes a loss with smoothed labels: of each token a share of the target belongs to all tokens alike.

It is torch's ``cross_entropy(..., label_smoothing=share)`` in the place of the model's own, by the hook that
transformers has for it, ``model.loss_function``; that of a Trainer with ``label_smoothing_factor`` is the same number.
As a part of the model's graph it goes through the head that holds a block of logits at a time. Scores, for which no
gradients are taken, have the plain loss.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from chunkft_fx.errors import OptionError
from chunkft_fx.graph.layout import wide_dtype
from chunkft_fx.tools.data.rows import IGNORED


def smooth_labels(model: Any, share: float, task: str, can_run: bool = True) -> None:
    """Have a model's loss smooth its labels by ``share``.

    A model with a loss of its own never calls the hook: where it ``can_run``, that is tried, and `OptionError` raised.
    """
    if can_run and not _calls_its_loss(model, task):
        raise OptionError(
            f"label-smoothing is {share}, and a {type(model).__name__} computes its loss itself, past "
            "model.loss_function; leave it out"
        )
    model.loss_function = partial(_smoothed, share=share, shifted=task == "causal")


def _smoothed(
    logits: Tensor | None = None, labels: Tensor | None = None, *_: Any, share: float, shifted: bool, **more: Any
) -> Tensor:
    # classifiers hand over the logits of all tokens too, beside those that count
    scores = more.get("pooled_logits")
    scores = logits if scores is None else scores
    assert scores is not None and labels is not None, "transformers calls it with names"
    if shifted:
        labels = functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    return functional.cross_entropy(
        scores.to(wide_dtype(scores.dtype)).flatten(0, -2),
        labels.flatten().to(scores.device),
        ignore_index=IGNORED,
        label_smoothing=share if torch.is_grad_enabled() else 0.0,
    )


@torch.no_grad()
def _calls_its_loss(model: Any, task: str) -> bool:
    """Whether a model goes by its ``loss_function``; tried on two tokens."""
    called: list[bool] = []

    def told(*given: Any, **more: Any) -> Tensor:
        called.append(True)
        return torch.zeros(())

    ids = torch.zeros((1, 2), dtype=torch.int64, device=next(model.parameters()).device)
    was_training = model.training
    own = model.__dict__.get("_loss_function")
    model.eval()
    model.loss_function = told
    try:
        model(input_ids=ids, labels=ids[:, 0] if task == "classification" else ids)
    finally:
        model.train(was_training)
        if own is None:
            del model._loss_function
        else:
            model.loss_function = own
    return bool(called)

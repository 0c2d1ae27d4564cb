"""Copies rank 0's model to all ranks, once they know that they were given the same kind of model."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from chunkft_fx.ranks.ranks import Ranks


def same_model(ranks: Ranks, model: nn.Module, device: torch.device) -> None:
    """Give all ranks the parameters and buffers of rank 0's ``model``; those in host memory pass through ``device``.

    Raises `RanksDisagree`, on all ranks and before anything changes, where names, shapes, dtypes or ``requires_grad``
    of parameters differ.
    """
    kinds = [(n, tuple(p.shape), str(p.dtype), p.requires_grad) for n, p in model.named_parameters()]
    digest = hashlib.sha256(repr(kinds).encode()).hexdigest()[:12]
    found = f"{len(kinds)} parameters, their names, shapes, dtypes and requires_grad with digest {digest}"
    ranks.require_same("the model", found, "make the same model on all ranks")
    ranks.same_everywhere([t.detach() for t in (*model.parameters(), *model.buffers())], device)

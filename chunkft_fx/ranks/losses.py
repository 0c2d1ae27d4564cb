"""Runs what a loss needs so that ranks with batches of different sizes train as one process with all of them would."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def mean_over_ranks(loss: Tensor, count: int | Tensor) -> Tensor:
    """A rank's mean loss as its part of the mean over what all ranks have.

    ``loss`` (0-d) is the mean over ``count`` items of this rank's batch, tokens with a label, say; a rank without any
    gives 0, whatever its loss is. Gradients are averaged over ranks with equal weight, which is not the mean over all
    items unless each rank has as many. What is returned, also 0-d, is ``loss`` times ``count`` over the mean count of
    ranks: call ``backward`` on that. All ranks have to call it together. Without other ranks it is ``loss`` itself.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return loss
    own = torch.as_tensor(count, dtype=torch.float64, device=loss.device)
    total = own.clone()
    dist.all_reduce(total)
    weight = (own * dist.get_world_size() / total.clamp(min=1)).to(loss.dtype)
    return torch.where(own > 0, loss, torch.zeros_like(loss)) * weight

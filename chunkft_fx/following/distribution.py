"""Decides nothing, refuses by name: several ranks, and the wrappers that spread a model over them."""

from __future__ import annotations

import torch.distributed
from torch import nn

from chunkft_fx.errors import DistributedNotSupported
from chunkft_fx.torch_internals import is_sharded, wrapping_ddp


def refuse_sharded(model: nn.Module) -> None:
    """Raise `DistributedNotSupported` for a model whose weights are spread over ranks."""
    if is_sharded(model):
        raise DistributedNotSupported(
            "this model is sharded by FSDP or holds DTensor parameters; pass a plain model, whose weights are whole"
        )


def refuse_ranks() -> None:
    """Raise `DistributedNotSupported` in a process that is one of several ranks, or inside DistributedDataParallel."""
    if not torch.distributed.is_available():
        return
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise DistributedNotSupported(
            f"torch.distributed runs with {torch.distributed.get_world_size()} ranks, and gradients of slices are not "
            "reduced over ranks; train on one rank (without torchrun or init_process_group)"
        )
    if wrapping_ddp() is not None:
        raise DistributedNotSupported(
            "DistributedDataParallel reduces whole gradients, which a compiled module does not have; use the "
            "module that chunkft_fx.compile returned without it"
        )

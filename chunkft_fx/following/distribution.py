"""Decides nothing, refuses by name: ranks that came too late, and the wrappers that spread a model over them."""

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


def refuse_other_ranks(known: int) -> None:
    """Raise `DistributedNotSupported` for other ranks than at compile, and inside DistributedDataParallel."""
    if not torch.distributed.is_available():
        return
    now = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if now != known:
        raise DistributedNotSupported(
            f"torch.distributed runs with {now} ranks, and this model was compiled for {known}; call "
            "init_process_group before chunkft_fx.compile, and destroy_process_group when training is over"
        )
    if wrapping_ddp() is not None:
        raise DistributedNotSupported(
            "DistributedDataParallel reduces whole gradients, which a compiled module does not have; use the "
            "module that chunkft_fx.compile returned without it"
        )

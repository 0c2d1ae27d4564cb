"""A model whose moments are kept in 8 bits: in whole blocks and short ones, cut along either dimension, and not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.plan.chunk import Slice
from chunkft_fx.plan.state_spec import master_dtype

WIDTH = 256
# Of which parameters moments are codes, and the blocks of an index of their cut dimension.
BLOCKS = {"first.weight": 1, "second.weight": 2, "across": 2, "narrow": 1}


class BlockNet(nn.Module):
    """Rows of one block (``first``), of one and a short one (``second``), of 64 (``narrow``); ``across`` along 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 300)
        self.second = nn.Linear(300, 70)
        self.across = nn.Parameter(torch.randn(5, 70, 60) * 0.1)
        self.narrow = nn.Parameter(torch.randn(66, 64) * 0.1)
        self.thin = nn.Parameter(torch.randn(64, 3) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        mixed = torch.tanh(torch.einsum("bi,kij->bj", hidden, self.across))
        wide = torch.tanh(mixed @ self.narrow[:60])
        result: Tensor = (wide @ self.thin).square().mean()
        return result


def block_net(dtype: torch.dtype = torch.float32, seed: int = 0) -> BlockNet:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    return BlockNet().to(dtype)


def block_batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs of one step: ``[6, 256]``."""
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(step)).to(dtype)


def block_compiled(model: nn.Module, **options: Any) -> CompiledModule:
    """Compiled with operators as they are, a budget that anything fits and, unless told otherwise, turns of a step."""
    return chunkft_fx.compile(model, "1GB", backend="eager", **{"interval": 1, **options})


def feed_sweep(module: CompiledModule, sweep: int) -> None:
    """Gradients for the active slices that are the same for an element, whichever chunk it is in."""
    with module.residency.presented():
        for s in module.active_slices():
            dense = _dense(s.parameter, s.name, sweep)
            s.grad = _cut(dense, s.slice).to(module._training.compute_device)


def _dense(parameter: Tensor, name: str, sweep: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * sweep + sum(name.encode()))
    drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return (drawn * 10.0 ** -torch.rand(parameter.shape, generator=generator)).to(master_dtype(parameter))


def _cut(gradient: Tensor, s: Slice) -> Tensor:
    return gradient if s.is_whole else gradient.narrow(s.dim, s.start, s.length).clone()

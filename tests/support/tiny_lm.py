"""A small language model with two blocks, whose loss depends on every weight, and batches for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import chunkft_fx
from chunkft_fx.module.module import CompiledModule

VOCABULARY, WIDTH = 13, 8


class TinyLM(nn.Module):
    """Takes ``ids`` or ``embeds``; with ``labels`` it returns the loss, else the logits."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor | None = None, labels: Tensor | None = None, embeds: Tensor | None = None) -> Tensor:
        x: Tensor = self.embed(ids) if embeds is None else embeds
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        logits: Tensor = self.head(x) * self.scale
        return logits if labels is None else cross_entropy(logits.flatten(0, 1), labels.flatten())


def tiny_lm(seed: int = 0) -> Any:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    return TinyLM()


def lm_batch(seed: int = 0, rows: int = 2, length: int = 5) -> dict[str, Tensor]:
    """``ids`` and ``labels``, both ``i64[rows, length]``."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randint(0, VOCABULARY, (rows, length), generator=generator) for _ in range(2)]
    return {"ids": draw[0], "labels": draw[1]}


def lm_compiled(model: nn.Module | None = None, chunks: int = 2) -> Any:
    """Compiled with an ample budget; a `CompiledModule` that has what its model has."""
    compiled: CompiledModule = chunkft_fx.compile(model or tiny_lm(), "1GB", chunks=chunks, interval=1, backend="eager")
    return compiled

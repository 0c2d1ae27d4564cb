"""Small random models in float64: blocks of many kinds in any order, shared and tied weights, rarely used parts.

`specs` draws what a model is made of, `RandomModel` is made of it. Blocks in ``layers`` are regions of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

VOCABULARY, WIDTH = 11, 6


class Gated(nn.Module):
    """Two halves of one matrix, multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH + 2, bias=False)
        self.down = nn.Linear(WIDTH + 1, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        down: Tensor = self.down(nn.functional.silu(gate) * value)
        return down


class Attention(nn.Module):
    """Two heads, their three matrices in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed = nn.Parameter(torch.randn(3, WIDTH, WIDTH) * 0.4)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._heads(x @ matrix) for matrix in self.mixed.unbind())
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, WIDTH // 2)).transpose(1, 2)


class Experts(nn.Module):
    """Every token is taken by the better one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.Parameter(torch.randn(2, WIDTH, WIDTH) * 0.4)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        best, chosen = weights.max(-1, keepdim=True)
        every = torch.einsum("btw,ewv->btev", x, self.experts)
        return best * every.gather(2, chosen[..., None].expand(*chosen.shape, WIDTH)).squeeze(2)


class Convolved(nn.Module):
    """A convolution over the tokens, behind a normalisation with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        convolved: Tensor = self.conv(self.norm(x.transpose(1, 2)))
        return convolved.transpose(1, 2)


class Scaled(nn.Module):
    """Parameters of no dimension, of one element, and of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.7))
        self.offset = nn.Parameter(torch.full((1,), 0.1))
        self.row = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.factor + self.offset + self.row)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()),
    "normed": lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)),
    "rms": lambda: nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)),
    "dropped": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2)),
    "gated": Gated,
    "attention": Attention,
    "experts": Experts,
    "convolved": Convolved,
    "scaled": Scaled,
}


@dataclass(frozen=True)
class Spec:
    """``kinds`` are the blocks in ``layers``; ``shared`` has some of them be an earlier block, by index; ``rare`` is
    the kind of a block that a batch may leave out; ``seed`` is of the weights."""

    seed: int
    kinds: tuple[str, ...]
    shared: tuple[tuple[int, int], ...]
    rare: str
    is_tied: bool
    has_unused: bool


class RandomModel(nn.Module):
    """An embedding, the blocks, the rare block, and a head; returns the loss of predicting ``ids``."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        torch.manual_seed(spec.seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        blocks = [KINDS[kind]() for kind in spec.kinds]
        for later, earlier in spec.shared:
            blocks[later] = blocks[earlier]
        self.layers = nn.ModuleList(blocks)
        self.rare = KINDS[spec.rare]()
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=not spec.is_tied)
        if spec.is_tied:
            self.head.weight = self.embed.weight
        if spec.has_unused:
            self.unused = nn.Parameter(torch.ones(3, 2))
        self.double()

    def forward(self, ids: Tensor, is_rare: bool) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        if is_rare:
            x = x + self.rare(x)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), ids.flatten())


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """What a model of one to four blocks is made of."""
    kinds = tuple(draw(st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=4)))
    pairs = [(later, earlier) for later in range(len(kinds)) for earlier in range(later)]
    is_shared = draw(st.booleans())
    shared = (draw(st.sampled_from(pairs)),) if pairs and is_shared else ()
    return Spec(
        seed=draw(st.integers(0, 999)),
        kinds=kinds,
        shared=shared,
        rare=draw(st.sampled_from(list(KINDS))),
        is_tied=draw(st.booleans()),
        has_unused=draw(st.booleans()),
    )


def batches(seed: int, sizes: list[tuple[int, int]], rare: list[bool]) -> Callable[[int, int], dict[str, Any]]:
    """Batches of these sizes in turn (rows, tokens), of which some use the rare block."""

    def at(step: int, micro: int) -> dict[str, Any]:
        number = 3 * step + micro
        generator = torch.Generator().manual_seed(seed + number)
        ids = torch.randint(0, VOCABULARY, sizes[step % len(sizes)], generator=generator)
        return {"ids": ids, "is_rare": rare[number % len(rare)]}

    return at

"""Moments in 8 bits train a small model as float32 ones do."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import chunkft_fx

STATES, STEPS = 64, 200
CHAIN = torch.softmax(2 * torch.randn(STATES, STATES, generator=torch.Generator().manual_seed(0)), -1)


class Predictor(nn.Module):
    """The loss of the next state of a Markov chain, of which each batch is new: it ends above the chain's entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(STATES, 128)
        self.middle = nn.Linear(128, 256)
        self.head = nn.Linear(256, STATES)

    def forward(self, ids: Tensor) -> Tensor:
        return cross_entropy(self.head(torch.tanh(self.middle(self.embed(ids[:-1])))).flatten(0, 1), ids[1:].flatten())


def states(seed: int) -> Tensor:
    """Eight walks through the chain, ``i64[65, 8]``."""
    generator = torch.Generator().manual_seed(seed)
    walk = [torch.randint(0, STATES, (8,), generator=generator)]
    for _ in range(64):
        walk.append(torch.multinomial(CHAIN[walk[-1]], 1, generator=generator)[:, 0])
    return torch.stack(walk)


def loss_after(state_dtype: str, first: int) -> float:
    """The loss on other batches after training on those from ``first`` on."""
    torch.manual_seed(0)
    model = Predictor()
    module = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager")
    optimizer = chunkft_fx.AdamW(module, lr=3e-3, state_dtype=state_dtype)
    for step in range(STEPS):
        optimizer.zero_grad()
        module(states(first + step)).backward()
        optimizer.step()
    with torch.no_grad():
        return sum(float(model(states(10**6 + i))) for i in range(8)) / 8


def test_the_loss_is_nearer_to_that_of_float32_moments_than_other_batches_bring_it() -> None:
    exact, eight, other = loss_after("float32", 0), loss_after("8bit", 0), loss_after("float32", 1000)
    entropy = float(-(CHAIN * CHAIN.log()).sum(-1).mean())
    assert exact < entropy + 0.2 < 3  # it was 4.2
    # what the choice of batches adds is the least that a difference has to be to mean anything
    assert abs(eight - exact) < abs(other - exact) / 4

"""A small model for tests of the optimizer, compiled as a user does, and its dense gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.plan.state_spec import master_dtype


class Net(nn.Module):
    """A little of everything: tall and wide matrices, a convolution, a bias, a scalar, an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(8, 12) * 0.3)
        self.position = nn.Parameter(torch.randn(1, 5, 8) * 0.3)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 9, 3)
        self.head = nn.Linear(27, 7)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(x @ self.wide.t()) + self.position)
        result: Tensor = self.head(torch.tanh(self.conv(hidden.transpose(1, 2))).flatten(1)) * self.scale
        return result.square().mean()


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    return Net().to(dtype)


def compiled(model: nn.Module, chunks: int = 1, order: str = "ascending", interval: int = 1) -> CompiledModule:
    """What `chunkft_fx.compile` makes of a model, with operators as they are and a budget that anything fits.

    It has a plan at once, and traces the model (about a second) only if it is called.
    """
    return chunkft_fx.compile(model, "1GB", chunks=chunks, order=order, interval=interval, backend="eager")


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs of one step: ``[4, 5, 12]``."""
    return torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(1000 + step)).to(dtype)


def dense_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The plain gradients by name, of the parameters that have one."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {n: g for (n, _), g in zip(named, gradients, strict=True) if g is not None}


def train_step(module: CompiledModule, optimizer: torch.optim.Optimizer, step: int, dtype: torch.dtype) -> None:
    """Zero, forward, backward, step: as a user writes it."""
    optimizer.zero_grad()
    module(batch(step, dtype)).backward()
    optimizer.step()


def feed(module: CompiledModule, step: int) -> None:
    """Random gradients for the active slices, the same on every device: states without forward and backward."""
    generator = torch.Generator().manual_seed(step)
    active = module.active_slices()
    drawn = [torch.randn(s.weight().shape, generator=generator, dtype=torch.float64) for s in active]
    with module.residency.presented():  # torch takes a gradient only where its parameter is, or seems to be
        for s, gradient in zip(active, drawn, strict=True):
            s.grad = gradient.to(module._training.compute_device, master_dtype(s.parameter))

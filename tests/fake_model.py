"""A stand-in for a compiled module: a plain one, whose dense gradients are cut into the active slices by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from chunkft_fx.cuts import ParameterSpec, cut
from chunkft_fx.errors import NotPlanned
from chunkft_fx.plan import Plan
from chunkft_fx.slices import ActiveSlice, ChunkSchedule
from chunkft_fx.streaming import StageOwner


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


class FakeModule(nn.Module):
    """What `chunkft_fx.optim_groups.ChunkedModule` asks for, around a plain one; ``chunks=None``: no plan yet."""

    def __init__(self, model: Net, chunks: int | None = 1, order: str = "ascending", interval: int = 1) -> None:
        super().__init__()
        self.model = model
        self._plan: Plan | None = None
        if chunks is not None:
            specs = [ParameterSpec(n, tuple(p.shape), 12, 0) for n, p in self.named_parameters() if p.requires_grad]
            self._plan = Plan(2**30, cut(specs, chunks), order, interval, 0)
            self._schedule = ChunkSchedule(chunks, order, interval)
        self._slices: tuple[ActiveSlice, ...] = ()

    @property
    def plan(self) -> Plan:
        if self._plan is None:
            raise NotPlanned("no batch yet")
        return self._plan

    @property
    def schedule(self) -> ChunkSchedule:
        if self._plan is None:
            raise NotPlanned("no batch yet")
        return self._schedule

    @property
    def compute_device(self) -> torch.device:
        return next(self.model.parameters()).device

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters(*args, **kwargs)

    def active_slices(self) -> tuple[ActiveSlice, ...]:
        if not self._slices:
            parameters = dict(self.named_parameters())
            chunk = self.plan.chunks[self.schedule.chunk]
            self._slices = tuple(ActiveSlice(s, parameters[s.name]) for s in chunk.slices)
        return self._slices

    def advance(self) -> bool:
        changed = self.schedule.advance()
        if changed:
            self._slices = ()
        return changed

    def expect(self, optimizer: StageOwner) -> None:
        """Nothing here lets states in: they come when the update asks for them."""

    def schedule_position(self) -> dict[str, Any] | None:
        return self._schedule.state_dict() if self._plan is not None else None

    def resume(self, position: Mapping[str, Any]) -> None:
        self.schedule.load_state_dict(position)
        self._slices = ()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.model(x)
        return result

    def backward(self, loss: Tensor) -> None:
        """Dense backward of the plain module; the active slices accumulate their parts."""
        gradients = dense_gradients(self.model, loss)
        for s in self.active_slices():
            if s.name in gradients:
                dense = gradients[s.name]
                s.accumulate(dense if s.slice.is_whole else dense.narrow(s.dim, s.start, s.length))


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    return Net().to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs of one step: ``[4, 5, 12]``."""
    return torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(1000 + step)).to(dtype)


def dense_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The plain gradients by name, of the parameters that have one."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {n: g for (n, _), g in zip(named, gradients, strict=True) if g is not None}


def train_step(module: FakeModule, optimizer: torch.optim.Optimizer, step: int, dtype: torch.dtype) -> None:
    """Zero, forward, backward, step: as a user writes it."""
    optimizer.zero_grad()
    module.backward(module(batch(step, dtype)))
    optimizer.step()

"""Small trainings that are saved and loaded: a model, its optimizer and a scheduler, in each way of training."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import chunkft_fx

# What of compile and of the optimizer differs, and the dtype of the weights.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], torch.dtype]] = {
    "chunks": ({"chunks": 3, "order": "random", "interval": 2}, {}, torch.float32),
    "chunks in bfloat16": ({"chunks": 3, "interval": 1}, {"master": "remainder"}, torch.bfloat16),
    "all": ({"coverage": "all"}, {"max_grad_norm": 1.0}, torch.bfloat16),
    "late": ({"coverage": "all"}, {"update": "late"}, torch.float32),
    "backward": ({"coverage": "all"}, {"update": "backward", "master": "remainder"}, torch.bfloat16),
    "8 bits": ({"chunks": 2, "interval": 1}, {"state_dtype": "8bit", "master": "remainder"}, torch.bfloat16),
}


class Net(nn.Module):
    """A wide matrix that is cut along its columns, one with 8-bit states, tied weights, a scalar, an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(8, 96) * 0.1)
        self.square = nn.Linear(96, 96)
        self.head = nn.Linear(96, 80)
        self.tied = nn.Linear(96, 80, bias=False)
        self.tied.weight = self.head.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.tensor([3]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.dropout(torch.tanh(self.square(x @ self.wide)), 0.2, self.training)
        result: Tensor = (self.head(hidden) + self.tied(hidden)) * self.scale
        return result.float().square().mean()


@dataclass(frozen=True)
class Made:
    """A training that can be stepped; each step is drawn from its number, and dropout from torch's state."""

    model: Any
    optimizer: Any
    scheduler: Any
    device: str = "cpu"

    def step(self, number: int) -> None:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))
        self.model(x.to(self.device, self.model.wide.dtype)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def steps(self, first: int, end: int) -> None:
        for number in range(first, end):
            self.step(number)

    def values(self) -> dict[str, Any]:
        """All that training changes, as copies."""
        state = self.optimizer.state_dict()
        return copy.deepcopy(
            {"weights": dict(self.model.state_dict()), **state, "scheduler": self.scheduler.state_dict()}
        )


def made(way: str, adafactor: bool = False, device: str = "cpu") -> Made:
    """A new training, the same for the same way."""
    compiling, options, dtype = WAYS[way]
    torch.manual_seed(0)
    compiled = chunkft_fx.compile(Net().to(device, dtype), "8GB", backend="eager", **compiling)
    kind: Any = chunkft_fx.Adafactor if adafactor else chunkft_fx.AdamW
    optimizer = kind(compiled, lr=1e-2, **options)
    return Made(compiled, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20), device)


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Equal to the bit, with all that is in dictionaries and lists."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor) and a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}.{i}")
    else:
        assert a == b, where

"""A forward that writes its own weights is refused by name, before the weight changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.errors import UnsupportedGraph


class _Clips(nn.Module):
    """A projection whose weight is clipped in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.clipped = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.clipped.weight.data.clamp_(-0.1, 0.1)
        return self.clipped(self.first(x)).square().sum()


class _Decays(_Clips):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.clipped.weight.mul_(0.5)
        return self.clipped(self.first(x)).square().sum()


class _Normalises(_Clips):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.clipped.weight.copy_(self.clipped.weight / self.clipped.weight.norm())
        return self.clipped(self.first(x)).square().sum()


@pytest.mark.parametrize("kind", [_Clips, _Decays, _Normalises])
def test_a_weight_written_in_forward_is_refused_by_name(kind: type[_Clips]) -> None:
    model = kind()
    before = model.clipped.weight.detach().clone()
    compiled = chunkft_fx.compile(model, "1GB", chunks=2, interval=1, backend="eager")
    with pytest.raises(UnsupportedGraph, match=r"writes the weight clipped\.weight"):
        compiled(torch.randn(2, 3))
    assert torch.equal(model.clipped.weight, before)

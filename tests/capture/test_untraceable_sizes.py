"""What torch refuses while it traces is refused here by one error class, also where torch raises no Dynamo error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.errors import UnsupportedGraph


class _Repeated(nn.Module):
    """Pieces whose number is data, as vision encoders take packed images."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)

    def lengths(self, counts: Tensor) -> Tensor:
        return torch.repeat_interleave(counts, counts)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        pieces = torch.split(self.project(x), self.lengths(counts).tolist(), dim=0)
        return torch.stack([p.std() for p in pieces]).sum()


class _Chosen(_Repeated):
    def lengths(self, counts: Tensor) -> Tensor:
        return counts[counts > 1]


class _Distinct(_Repeated):
    def lengths(self, counts: Tensor) -> Tensor:
        return torch.unique(counts).diff()


@pytest.mark.parametrize("kind", [_Repeated, _Chosen, _Distinct])
def test_lists_of_lengths_whose_number_is_data_are_refused(kind: type[_Repeated]) -> None:
    compiled = chunkft_fx.compile(kind(), "1GB", chunks=2, interval=1, backend="eager")
    with pytest.raises(UnsupportedGraph, match="data-dependent"):
        compiled(torch.randn(6, 4), torch.tensor([1, 2]))

"""The copy kernel in Triton's interpreter; `test_interpreted` runs this file in a process of its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chunkft_fx.errors import OptionError
from chunkft_fx.kernels.copy import copy, launch_copy
from chunkft_fx.kernels.launch import LaunchOptions
from tests.kernels.operands import CopySpec, assert_copied, copy_specs, in_place, tensors_to_copy

SMALL = LaunchOptions(tile=64, on_host=3)


@settings(max_examples=25)
@given(drawn=st.lists(copy_specs(), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_every_source_arrives_and_nothing_beside_it_is_written(drawn: list[CopySpec], seed: int) -> None:
    torch.manual_seed(seed)
    pairs = [tensors_to_copy(spec, in_place) for spec in drawn]
    launch_copy([p.source for p in pairs], [p.destination for p in pairs], torch.device("cpu"), SMALL)
    for p in pairs:
        assert_copied(p)


def test_shapes_may_differ_where_numel_is_the_same() -> None:
    source, destination = torch.arange(12.0).view(3, 4), torch.zeros(2, 6)
    launch_copy([source], [destination], torch.device("cpu"))
    assert torch.equal(destination.view(-1), source.view(-1))


@pytest.mark.parametrize(
    ("source", "destination", "message"),
    [
        (torch.zeros(3), torch.zeros(4), "3 elements"),
        (torch.zeros(3), torch.zeros(3).double(), "float64"),
        (torch.zeros(3, 4).T, torch.zeros(4, 3), "make it contiguous"),
        (torch.zeros(4, 3), torch.zeros(3, 4).T, "make it contiguous"),
    ],
)
def test_tensors_that_do_not_match_are_refused(source: Tensor, destination: Tensor, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        copy([source], [destination])
    with pytest.raises(OptionError, match="2 sources"):
        copy([source, source], [destination])

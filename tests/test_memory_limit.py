"""The allocator settings that a budget asks for, beside those of the user."""

from __future__ import annotations

import pytest
import torch

from chunkft_fx import memory_limit
from chunkft_fx.memory_limit import (
    PAGE_NBYTES,
    PAGE_ROUNDING_NBYTES,
    avoid_fragmentation,
    expandable,
    overhead,
)


@pytest.mark.parametrize(
    ("environment", "settings"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": ""}, "expandable_segments:True"),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "garbage_collection_threshold:0.8"},
            "garbage_collection_threshold:0.8,expandable_segments:True",
        ),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, None),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True"}, None),
    ],
)
def test_the_users_settings_stay(environment: dict[str, str], settings: str | None) -> None:
    assert expandable(environment) == settings


def test_the_cpu_has_nothing_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_settings: str) -> None:
        raise AssertionError("settings of another device's allocator were changed")

    monkeypatch.setattr(memory_limit, "set_allocator", refuse)
    avoid_fragmentation(torch.device("cpu"))


def test_what_the_limit_holds_back_is_predicted() -> None:
    """A step that needs what was predicted, and whose last page is nearly empty, must not meet the limit."""
    predicted = overhead(torch.device("cuda"), 0)
    assert predicted["fragmentation"] >= PAGE_ROUNDING_NBYTES + PAGE_NBYTES
    assert overhead(torch.device("cuda"), 1000 * 2**20)["fragmentation"] > predicted["fragmentation"]
    assert overhead(torch.device("cpu"), 1000 * 2**20) == {}

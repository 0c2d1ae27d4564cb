"""Each test on a GPU starts without the models of those before it: their budgets limit the allocator while they live."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def without_earlier_models() -> Iterator[None]:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    yield

"""Each test on a GPU starts without the models of earlier ones, whose budgets limit the allocator while they live."""

from __future__ import annotations

import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def without_earlier_models() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""What every test needs: passes verified, one thread a worker, fixed seeds, no hub access, no CUDA without a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["CHUNKFT_VERIFY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("default")


# Tests of more than 1.5 seconds, as they were measured: `tests.durations` writes this list.
SLOW = frozenset(Path(__file__).with_name("slow.txt").read_text().splitlines())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid in SLOW:
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True)
def clean_torch() -> Iterator[None]:
    """Each test starts from the same random state and leaves no compiled code behind."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch._dynamo.reset()

"""Keeps what the library datasets writes out of the user's cache."""

from __future__ import annotations

from collections.abc import Iterator

import datasets
import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of this session for tokens on disk."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield

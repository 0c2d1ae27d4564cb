"""A process that a launcher started as one of several, and that was not set up: nothing goes on as if it were."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunkft_fx.errors import ChunkFTWarning, OptionError
from chunkft_fx.ranks.ranks import on_this_host
from chunkft_fx.tools.cli import app
from tests.support.tiny_lm import lm_compiled


def test_compile_warns_of_a_process_that_would_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.warns(ChunkFTWarning, match="has started 4 processes"):
        lm_compiled()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert on_this_host() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert on_this_host() == 2


def test_the_command_line_refuses_to_train_as_one_of_several(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="chunkft train runs as one"):
        app(["train", "tiny:llama", "none.jsonl", "--budget", "1GB", "--out", str(tmp_path)], standalone_mode=False)

"""Every family in transformers' own registry, tiny, against its plain model; see `tests.coverage.sweep_families`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARDS = 40


@pytest.mark.slow
@pytest.mark.parametrize("coverage", ["one", "all"])
@pytest.mark.parametrize("shard", range(SHARDS))
def test_families_of_transformers_train_as_the_plain_models_do(shard: int, coverage: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.coverage.sweep_families", "--once", "--shard", f"{shard}/{SHARDS}"]
    command += ["--coverage", coverage]
    command += ["--results", str(tmp_path / "results.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]

"""Runs the ``interpreted_*`` files in a process of their own: Triton chooses its interpreter when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


def test_kernels_in_the_interpreter() -> None:
    kernels = ("adamw", "adamw_blocks", "weight_gradient")
    files = [str(HERE / f"interpreted_{kernel}.py") for kernel in kernels]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    # no GPU: the interpreter takes the operands where they are
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout

"""The cross-entropy kernel in Triton's interpreter, and its reference against torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from chunkft_fx.kernels.cross_entropy import has_kernel, softmax_cross_entropy_

CASES = Path(__file__).with_name("interpreted_cross_entropy.py")


def test_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=CASES.parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_reference_is_torchs_loss_and_gradient(smoothing: float, dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    logits = torch.randn(7, 11).to(dtype)
    labels = torch.tensor([0, 3, -1, 10, 5, -1, 2])
    plain = logits.to(wide, copy=True).requires_grad_()
    expected = functional.cross_entropy(plain, labels, ignore_index=-1, label_smoothing=smoothing, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum() * 3, plain)
    losses = torch.empty(7, dtype=wide)
    softmax_cross_entropy_(logits, labels, losses, torch.tensor(3, dtype=wide), -1, smoothing)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits, gradient.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_kernel_serves_cuda_up_to_float32() -> None:
    assert has_kernel(torch.device("cuda"), torch.bfloat16)
    assert not has_kernel(torch.device("cuda"), torch.float64)
    assert not has_kernel(torch.device("cpu"), torch.float32)

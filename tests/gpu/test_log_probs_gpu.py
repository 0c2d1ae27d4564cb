"""The head of token log-probabilities on a GPU: exact to its dtype, within the memory that is predicted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chunkft_fx.head import log_probs as head
from chunkft_fx.head.memory import head_workspace
from tests.head.test_log_probs import ALL, drawn, formula
from tests.head.test_operators import node_of

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_values_and_gradients_are_those_of_the_formula(dtype: torch.dtype, error: float, softcap: float | None) -> None:
    (hidden, weight), bias, labels = drawn(300, 1000, 64, dtype=dtype, bias=True)
    assert bias is not None
    h, w, b = operands = [t.detach().mul(0.3).to(CUDA).requires_grad_() for t in (hidden, weight, bias)]
    labels = labels.to(CUDA)
    found = head.forward(h, w, b, labels, 0.5, softcap, ALL)
    h, w, b = exact = [t.detach().double().requires_grad_() for t in operands]
    expected = formula(h, w, b, labels, 0.5, softcap)
    for a, b in zip(found[:4], expected[:4], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=error, atol=error)
    tangents = [torch.linspace(-1, 1, 300, device=CUDA), torch.linspace(0, 1, 300, device=CUDA)]
    ours = torch.autograd.grad(found[:2], operands, tangents)
    theirs = torch.autograd.grad(expected[:2], exact, [t.double() for t in tangents])
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).norm() / b.norm()) < error


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_memory_is_what_is_predicted(kind: str) -> None:
    hidden = torch.randn(4096, 512, device=CUDA, dtype=torch.bfloat16)
    weight = torch.randn(49152, 512, device=CUDA, dtype=torch.bfloat16)
    args: list[Any] = [hidden, weight, None, torch.zeros(4096, device=CUDA, dtype=torch.long), 1.0, None]
    if kind == "forward":
        target, args = head.forward, [*args, ALL]
    else:
        target, args = head.backward, [*torch.ones(2, 4096, device=CUDA), *args, [True, True, False]]
    target(*args)  # takes cuBLAS's workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = target(*args)
    peak = torch.cuda.max_memory_allocated() - before
    predicted = head_workspace(node_of(target, args)) + sum(t.nbytes for t in results)
    assert predicted == pytest.approx(peak, rel=0.03)

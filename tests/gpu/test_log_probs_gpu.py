"""The head of token log-probabilities on a GPU: exact to its dtype, within the memory that is predicted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import chunkft_fx
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


class Scored(nn.Module):
    """A language model that gives its tokens' log-probabilities and entropies, as TRL's trainers have it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shape: Any = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
        self.lm = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=49152, use_cache=False)).to(CUDA, torch.bfloat16)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.lm.model(ids).last_hidden_state[:, :-1].reshape(-1, 512)
        found = head.forward(hidden, self.lm.lm_head.weight, None, ids[:, 1:].reshape(-1), 1.0, None, ALL)
        return found[0], found[1]


@pytest.mark.parametrize("coverage", ["all", "one"])
def test_a_model_with_such_a_head_trains_under_its_budget(coverage: str) -> None:
    """The logits alone would be 0.8 GB in bfloat16, and three times more in float32 with their softmax and gradient."""
    ids = torch.randint(0, 49152, (8, 1024), device=CUDA, generator=torch.Generator(CUDA).manual_seed(0))
    plain = Scored()
    with torch.no_grad():
        expected = -plain(ids)[0].mean()
    del plain
    torch.cuda.empty_cache()
    options: Any = {"coverage": "all"} if coverage == "all" else {"coverage": "one", "chunks": 4, "interval": 1}
    compiled = chunkft_fx.compile(Scored(), "1.5GB", **options)
    torch.cuda.reset_peak_memory_stats()
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-3)
    before = [p.detach().clone().cpu() for p in compiled.parameters()]
    losses = []
    for _ in range(8):
        loss = -compiled(ids)[0].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    torch.testing.assert_close(losses[0], float(expected), rtol=0, atol=2e-2)
    assert losses[-1] < losses[0] - 0.3
    assert torch.cuda.max_memory_reserved() <= 1.5e9
    changed = [not torch.equal(p.detach().cpu(), q) for p, q in zip(compiled.parameters(), before, strict=True)]
    assert sum(changed) >= len(changed) - 9  # norms of ones round a change of 1e-3 away

"""What stays on the device from step to step lies together: steps find one run of memory, and the budget is kept."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import chunkft_fx
from chunkft_fx.errors import BudgetInfeasible
from chunkft_fx.memory_limit import PAGES_NBYTES

pytestmark = pytest.mark.gpu


def _train() -> tuple[int, int, int]:
    """Budget, bytes reserved at most, and bytes lost between what stays, after some steps in a process of their own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8, vocab_size=64000,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().train()
    ids = torch.randint(0, 64000, (2, 512), device="cuda")
    with pytest.raises(BudgetInfeasible) as caught:
        chunkft_fx.compile(model, 1, chunks=48, device="cuda")(input_ids=ids, labels=ids)
    compiled = chunkft_fx.compile(model, caught.value.smallest_budget_bytes, chunks=48, device="cuda")
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-4)
    for count in (1, 2, 1, 2):
        for _ in range(count):
            compiled(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    reserved = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    lost = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return compiled.plan.budget_bytes, reserved, lost


def test_what_stays_lies_together() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        budget, reserved, lost = pool.submit(_train).result()
    assert reserved <= budget
    assert lost <= PAGES_NBYTES

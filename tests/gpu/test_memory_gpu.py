"""The budget as a limit on CUDA, and what stays on the device from step to step: it lies together."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import chunkft_fx
from chunkft_fx.errors import BudgetInfeasible
from chunkft_fx.machine.memory_limit import LIMITS
from chunkft_fx.machine.overhead import PAGE_NBYTES, PAGES_NBYTES
from tests.support.forced_splits import unsplit

pytestmark = pytest.mark.gpu


def apart() -> ProcessPoolExecutor:
    """A process of its own, whose allocator nobody has used."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def _train() -> tuple[int, int, int]:
    """Budget, bytes reserved at most, and bytes lost between what stays, after some steps in a process of their own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8, vocab_size=64000,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().train()
    ids = torch.randint(0, 64000, (2, 512), device="cuda")
    with unsplit(), pytest.raises(BudgetInfeasible) as caught:
        chunkft_fx.compile(model, 1, chunks=48, device="cuda")(input_ids=ids, labels=ids)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # what a calibration took
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


def _accumulate() -> tuple[int, int]:
    """Budget and bytes reserved at most, after steps of four micro-batches that cover all parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8, vocab_size=32000,
        use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().train()
    ids = [torch.randint(0, 32000, (2, 512), device="cuda") for _ in range(4)]
    batches = [{"input_ids": i, "labels": i} for i in ids]

    def trained(budget: int) -> None:
        compiled = chunkft_fx.compile(model, budget, coverage="all", device="cuda")
        optimizer = chunkft_fx.AdamW(compiled, lr=1e-4, update="backward")
        for _ in range(3):
            torch.stack([o.loss for o in compiled.accumulate(batches)]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert compiled.plan.policy.micro_batches == 4

    with unsplit(), pytest.raises(BudgetInfeasible) as caught:
        trained(1)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # what a calibration took
    trained(caught.value.smallest_budget_bytes)
    torch.cuda.synchronize()
    return caught.value.smallest_budget_bytes, torch.cuda.max_memory_reserved()


def _fill(nbytes: int) -> int:
    """Take blocks until the limit of ``nbytes`` lets no more be taken; returns what was reserved by then."""
    device = torch.device("cuda", 0)
    (torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)).sum().item()
    owner = torch.nn.Module()
    LIMITS.set_up(owner, device)
    LIMITS.hold(owner, device, nbytes)
    blocks = []
    with pytest.raises(torch.OutOfMemoryError):
        while True:
            blocks.append(torch.empty(7 * 2**20, dtype=torch.uint8, device=device))
    return torch.cuda.max_memory_reserved()


def test_what_stays_lies_together() -> None:
    with apart() as pool:
        budget, reserved, lost = pool.submit(_train).result()
    assert reserved <= budget
    assert lost <= PAGES_NBYTES


def test_micro_batches_stay_within_the_smallest_budget_that_is_enough() -> None:
    with apart() as pool:
        budget, reserved = pool.submit(_accumulate).result()
    assert reserved <= budget


@pytest.mark.parametrize("nbytes", [110 * 2**20, 119 * 2**20])
def test_no_page_goes_beyond_the_limit(nbytes: int) -> None:
    with apart() as pool:
        reserved = pool.submit(_fill, nbytes).result()
    assert nbytes - PAGES_NBYTES - 2 * PAGE_NBYTES < reserved <= nbytes

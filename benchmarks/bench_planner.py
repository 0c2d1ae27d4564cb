"""How long planning takes: a Llama of many small blocks, planned on the CPU as if for a GPU.

    python -m benchmarks.bench_planner --blocks 80

Budgets are shares of the smallest feasible one. Rates are those that an H200 was calibrated to.
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

import chunkft_fx
from chunkft_fx.bytes import format_bytes
from chunkft_fx.errors import BudgetInfeasible
from chunkft_fx.machine.rates import Rates
from chunkft_fx.planning.planner import Options, plan_for_batch
from chunkft_fx.predict.predictor import Predictor

H200 = Rates({"bfloat16": 6.79e14, "float32": 5.0e13}, 3.92e12, 5.49e10, 5.49e10, 4.56e10, 7.3)
SHARES = (1.05, 1.3, 2.0)


def main(
    blocks: Annotated[int, typer.Option(help="transformer blocks")] = 80,
    width: Annotated[int, typer.Option(help="features")] = 64,
) -> None:
    """Plan for a hopeless budget and for some feasible ones, and print the seconds of each."""
    config = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_attention_heads=2, num_key_value_heads=2,
        num_hidden_layers=blocks, vocab_size=1000, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    ids = torch.randint(0, 1000, (2, 64))
    compiled = chunkft_fx.compile(model, "64GB", chunks=1)
    compiled(input_ids=ids, labels=ids)
    session = compiled._training.sessions[-1]

    smallest = 1
    for share in (1.0, *SHARES):  # the first budget is hopeless, and tells what the others are shares of
        budget = int(smallest * share)
        begin = time.perf_counter()
        try:
            options = Options(budget, "auto", "ascending", 1, 0)
            plan = plan_for_batch(model, options, None, Predictor(session.programs, known=H200), "this batch")
            what = (
                f"{len(plan.chunks)} chunks, {plan.policy.save_from} regions recompute, {len(plan.streamed)} streamed"
            )
        except BudgetInfeasible as error:
            smallest = error.smallest_budget_bytes
            what = f"infeasible, at least {format_bytes(smallest)}"
        print(f"{format_bytes(budget)}: {time.perf_counter() - begin:.1f} s: {what}", flush=True)


if __name__ == "__main__":
    typer.run(main)

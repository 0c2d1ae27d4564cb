"""Does a run always come to its end? The same short run again and again, each on a module compiled anew.

    python -m benchmarks.repeat_runs --case qwen3-4b,8,1024,16GB --runs 30

A run compiles the model, makes an optimizer, and trains two steps from each of a few chunks on that are spread over the
sweep (`activate`), the first and the last among them. A line for each chunk tells the loss and what host memory is
left, a line for each run its seconds and the most that torch reserved of the device: they tell where a run died.
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import torch

import chunkft_fx
from benchmarks.shapes import batches, build
from chunkft_fx.bytes import format_bytes, parse_bytes
from chunkft_fx.copies.host_memory import available_nbytes

SPOTS = 5


def run(model: torch.nn.Module, batch: torch.Tensor, budget: int) -> list[float]:
    """One run; returns the loss of each step."""
    compiled = chunkft_fx.compile(model, budget, interval=1, device="cuda")
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-5)
    losses = []
    compiled(input_ids=batch, labels=batch).loss.backward()
    optimizer.zero_grad()
    chunks = len(compiled.plan.chunks)
    for spot in range(SPOTS):
        compiled.activate(spot * (chunks - 1) // (SPOTS - 1))
        for _ in range(2):
            loss = compiled(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        print(
            f"    chunk {compiled.chunk} of {chunks}: {losses[-1]:.3f}, host {format_bytes(available_nbytes())}",
            flush=True,
        )
    return losses


def main() -> None:
    """Train the same model again and again in one process, and end with an error when losses are not finite."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", default="qwen3-4b,8,1024,16GB", help="shape,batch,sequence,budget")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    options = parser.parse_args()
    shape, size, length, budget = options.case.split(",")
    model: Any = build(shape, "cpu", options.layers)
    (batch,) = batches(model.config.vocab_size, int(size), int(length), "cuda", 1)
    for number in range(options.runs):
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        losses = run(model, batch, parse_bytes(budget))
        gc.collect()
        if not all(0 < loss < 100 for loss in losses):
            raise SystemExit(f"run {number}: losses {losses}")
        reserved = format_bytes(torch.cuda.max_memory_reserved())
        print(
            f"run {number}: {time.perf_counter() - start:.1f} s, last loss {losses[-1]:.3f}, reserved {reserved}",
            flush=True,
        )


if __name__ == "__main__":
    main()

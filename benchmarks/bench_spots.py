"""Times steps at a few chunks of a sweep: quick enough to compare two versions of the library on one machine.

    python -m benchmarks.bench_spots --case llama2-7b,8,1024,24GB,64 --case llama2-7b,1,1024,24GB,96

A case is ``shape,batch,sequence,budget,chunks``. The middles of `SPOTS` parts of the sweep stand for its mean. Each is
visited `ROUNDS` times in turn; of every visit the first step, which waits for the chunk's states, is not timed. Prints
the median and the smallest mean of a visit by spot, and the mean over spots, in milliseconds. Needs one CUDA GPU, and
host memory for the states of the whole model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

import chunkft_fx
from benchmarks.shapes import batches, build

SPOTS, ROUNDS, STEPS = 4, 5, 4


def measure(shape: str, size: int, length: int, budget: str, chunks: int) -> None:
    """Compile the shape with random weights and print the times of its steps."""
    model: Any = build(shape, "cpu")
    (ids,) = batches(model.config.vocab_size, size, length, "cuda", 1)
    compiled = chunkft_fx.compile(model, budget, chunks=chunks, interval=1, device="cuda")
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-5)

    def step() -> None:
        compiled(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    print(f"{shape} {size}x{length} under {budget}: first step {time.perf_counter() - begin:.1f} s", flush=True)
    spots = [(2 * i + 1) * chunks // (2 * SPOTS) for i in range(SPOTS)]
    visits: dict[int, list[float]] = {k: [] for k in spots}
    for _ in range(ROUNDS + 1):
        for k in spots:
            compiled.activate(k)
            step()
            compiled.activate(k)  # stay on the chunk
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(STEPS):
                step()
                compiled.activate(k)
            torch.cuda.synchronize()
            visits[k].append((time.perf_counter() - start) / STEPS * 1e3)
    times = {k: v[1:] for k, v in visits.items()}  # the first visit compiled
    for k, each in times.items():
        print(f"    chunk {k}: median {statistics.median(each):.2f} ms, smallest {min(each):.2f} ms")
    mean = statistics.mean(statistics.median(each) for each in times.values())
    least = statistics.mean(min(each) for each in times.values())
    print(f"    mean of medians {mean:.2f} ms, of smallest {least:.2f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", action="append", required=True, help="shape,batch,sequence,budget,chunks")
    for case in parser.parse_args().case:
        shape, size, length, budget, chunks = case.split(",")
        measure(shape, int(size), int(length), budget, int(chunks))


if __name__ == "__main__":
    main()

"""A trace of training steps on one GPU: how much of the copies between host and device lies under compute.

    python -m benchmarks.trace_step --batch 8 --budget 24GB --chunks 32 --out docs/trace.png

Steps in the middle of a second sweep are recorded with torch's profiler. ``under compute`` is the time of copies while
a kernel runs, over all their time. Needs one CUDA GPU and, to draw, matplotlib (the extra ``bench``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.profiler import ProfilerActivity, profile

import chunkft_fx
from benchmarks.shapes import batches, build

# Intervals in microseconds, by what runs.
Spans = dict[str, list[tuple[float, float]]]
COPIES = {"HtoD": "to the device", "DtoH": "to the host"}


def record(compiled: Any, optimizer: Any, ids: torch.Tensor, first: int, steps: int) -> Spans:
    """Run steps from a chunk on, the first two unrecorded, and return when kernels and copies ran."""

    def step() -> None:
        compiled(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    compiled.activate(first)
    for _ in range(steps + 2):
        step()  # makes programs and states of all these chunks
    compiled.activate(first)
    step()
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    spans: Spans = {"compute": [], **{name: [] for name in COPIES.values()}}
    for event in profiled.events() or []:
        if event.device_type.name == "CUDA":
            kind = next((v for k, v in COPIES.items() if f"Memcpy {k}" in event.name), "compute")
            spans[kind].append((event.time_range.start, event.time_range.end))
    return spans


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals, in order."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def overlap(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    """Microseconds in both of two unions of intervals."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        i, j = (i + 1, j) if a[i][1] < b[j][1] else (i, j + 1)
    return total


def table(spans: Spans) -> str:
    """Milliseconds of each kind, and of copies the share under compute."""
    busy = {name: merged(s) for name, s in spans.items()}
    every = merged([s for each in spans.values() for s in each])
    whole = every[-1][1] - every[0][0]
    compute = sum(e - b for b, e in busy["compute"])
    lines = ["| what | time | under compute |", "| --- | --- | --- |"]
    lines.append(f"| all recorded steps | {whole / 1e3:.1f} ms | |")
    lines.append(f"| compute | {compute / 1e3:.1f} ms | |")
    lines.append(f"| no kernel runs | {(whole - compute) / 1e3:.1f} ms | |")
    for name in COPIES.values():
        time = sum(e - b for b, e in busy[name])
        share = overlap(busy[name], busy["compute"]) / time if time else 1.0
        lines.append(f"| copies {name} | {time / 1e3:.1f} ms | {share:.1%} |")
    return "\n".join(lines)


def draw(spans: Spans, out: Path) -> None:
    """A picture of when each kind ran."""
    from matplotlib import pyplot

    busy = {name: merged(s) for name, s in spans.items()}
    begin = min(b for each in busy.values() for b, _ in each)
    figure, axes = pyplot.subplots(figsize=(10, 2.2))
    for row, each in enumerate(busy.values()):
        axes.broken_barh([((b - begin) / 1e3, (e - b) / 1e3) for b, e in each], (row - 0.4, 0.8), facecolors=f"C{row}")
    axes.set_yticks(range(len(busy)), [n if n == "compute" else f"copies {n}" for n in busy])
    axes.set_xlabel("milliseconds")
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main(
    batch: int = 8,
    sequence: int = 1024,
    budget: str = "24GB",
    chunks: Annotated[int, typer.Option(help="0: auto")] = 32,
    steps: int = 3,
    shape: str = "llama2-7b",
    out: Annotated[Path | None, typer.Option(help="draw the trace here, as PNG")] = None,
) -> None:
    """Record steps and say how much of their copies lies under compute."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this measurement needs a CUDA GPU")
    model: Any = build(shape, "cuda")
    ids = batches(model.config.vocab_size, batch, sequence, "cuda", 1)[0]
    compiled = chunkft_fx.compile(model, budget, chunks=chunks or "auto", interval=1)
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-5, weight_decay=0.0)
    compiled(input_ids=ids, labels=ids).loss.backward()
    spans = record(compiled, optimizer, ids, len(compiled.plan.chunks) // 2, steps)
    print(f"{torch.cuda.get_device_name()}, {shape}, {batch} x {sequence} tokens, {len(compiled.plan.chunks)} chunks")
    print(table(spans))
    if out is not None:
        draw(spans, out)


if __name__ == "__main__":
    typer.run(main)

"""Time and memory of a training step at the Llama-2-7B shape on one GPU, beside BAdam on the same data.

    python -m benchmarks.bench_step --batch 8 --out step-b8.json

Random bf16 weights, 32 chunks, float32 states of every chunk kept in pinned host memory, ``interval=1``.
The first sweep compiles and fills host memory; the second is measured. Needs one CUDA GPU and about 90 GB
of host memory at the full shape; ``--layers`` shrinks it.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import chunkft_fx

GIB = 2**30


@dataclass
class Row:
    """One trainer's figures: milliseconds a step over a sweep, GiB at the peak, seconds for the first step."""

    name: str
    batch: int
    mean_ms: float
    median_ms: float
    worst_ms: float
    allocated_gib: float
    reserved_gib: float
    first_step_s: float
    steps: int


def build(layers: int, device: str) -> LlamaForCausalLM:
    """The Llama-2-7B shape with random bf16 weights, made on the device."""
    config = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=4096, use_cache=False)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(torch.float32)


def batches(vocabulary: int, batch: int, sequence: int, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocabulary, (batch, sequence), generator=generator).to(device) for _ in range(4)]


def measure(name: str, batch: int, step: Callable[[int], None], warm: int, steps: int) -> Row:
    """Run ``warm`` steps, the first timed apart, then ``steps`` steps timed one by one to their completion."""
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step(0)
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    for i in range(1, warm):
        step(i)
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    begin = time.perf_counter()
    marks[0].record()
    for i in range(steps):
        step(warm + i)
        marks[i + 1].record()
    torch.cuda.synchronize()
    mean = (time.perf_counter() - begin) / steps * 1e3
    times = sorted(a.elapsed_time(b) for a, b in pairwise(marks))
    memory = [f() / GIB for f in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)]
    return Row(name, batch, mean, times[steps // 2], times[-1], memory[0], memory[1], first, steps)


def ours(args: argparse.Namespace, model: LlamaForCausalLM, data: list[Tensor]) -> tuple[Row, str, list[Check]]:
    compiled = chunkft_fx.compile(model, args.budget, chunks=args.chunks)
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-5, weight_decay=0.0)

    def step(i: int) -> None:
        ids = data[i % len(data)]
        compiled(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    row = measure("chunkft_fx", args.batch, step, args.chunks, args.chunks)
    compiled.activate(args.chunks // 2)
    ids = data[0]
    compiled(input_ids=ids, labels=ids).loss.backward()
    gradients = {s.name: (s.dim, s.start, s.length, s.grad) for s in compiled.active_slices()}
    return row, str(compiled.plan), check_gradients(model, ids, gradients)


@dataclass
class Check:
    """Relative errors of one slice's bf16 gradient: ours against eager's, and both against float32."""

    name: str
    ours_to_eager: float
    ours_to_float32: float
    eager_to_float32: float


def check_gradients(model: LlamaForCausalLM, ids: Tensor, gradients: dict[str, Any]) -> list[Check]:
    """Compare with eager autograd of the plain model in bf16, and with the same weights in float32."""
    eager = dense_gradients(model, ids, gradients)
    model.float()
    exact = dense_gradients(model, ids, gradients)
    model.bfloat16()
    checks = []
    for name, (dim, start, length, ours) in gradients.items():
        bf16, fp32 = (g[name].narrow(dim, start, length).float() for g in (eager, exact))
        pairs = ((ours, bf16), (ours, fp32), (bf16, fp32))
        checks.append(Check(name, *(float((a - b).norm() / b.norm()) for a, b in pairs)))
    return checks


def dense_gradients(model: LlamaForCausalLM, ids: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name: g for name in names if (g := model.get_parameter(name).grad) is not None}
    model.zero_grad()
    model.requires_grad_(True)
    return found


def badam(args: argparse.Namespace, model: LlamaForCausalLM, data: list[Tensor]) -> Row:
    """BAdam 1.4 with its defaults and a block a step; gradient checkpointing on, as its examples have it."""
    from badam import BlockOptimizer

    model.gradient_checkpointing_enable()
    base = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    named = list(model.named_parameters())
    optimizer = BlockOptimizer(base_optimizer=base, named_parameters_list=named, switch_block_every=1, verbose=0)

    def step(i: int) -> None:
        ids = data[i % len(data)]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    row = measure("BAdam 1.4", args.batch, step, 3, args.layers)
    model.gradient_checkpointing_disable()
    model.requires_grad_(True)
    return row


def table(rows: list[Row]) -> str:
    lines = ["| trainer | batch | mean step | median | slowest | peak allocated | peak reserved | first step |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    lines += [
        f"| {r.name} | {r.batch} | {r.mean_ms:.0f} ms | {r.median_ms:.0f} ms | {r.worst_ms:.0f} ms | "
        f"{r.allocated_gib:.1f} GiB | {r.reserved_gib:.1f} GiB | {r.first_step_s:.1f} s |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--budget", default="24GiB")
    parser.add_argument("--no-badam", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measurement needs a CUDA GPU")
    model = build(args.layers, "cuda")
    data = batches(model.config.vocab_size, args.batch, args.sequence, "cuda")
    # BAdam first, while no host memory is pinned yet, which would slow its allocations down.
    rows = [] if args.no_badam else [badam(args, model, data)]
    gc.collect()
    torch.cuda.empty_cache()
    row, plan, checks = ours(args, model, data)
    rows.append(row)
    print(plan)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batch {args.batch} x {args.sequence} tokens")
    print(table(rows))
    print("| gradient of | ours to eager | ours to float32 | eager to float32 |\n| --- | --- | --- | --- |")
    for c in checks:
        print(f"| {c.name} | {c.ours_to_eager:.1e} | {c.ours_to_float32:.1e} | {c.eager_to_float32:.1e} |")
    if args.out is not None:
        args.out.write_text(
            json.dumps(
                {"rows": [asdict(r) for r in rows], "checks": [asdict(c) for c in checks], "plan": plan}, indent=1
            )
        )


if __name__ == "__main__":
    main()

"""Time and memory of training steps on one GPU, beside BAdam on the same weights and data.

    python -m benchmarks.bench_step --case 8,1024,24GB --case 8,1024,45GB --case 1,1024,24GB --out step.json

A case is ``batch,sequence,budget[,chunks[,held|streamed]]``, by default at the Llama-2-7B shape; chunks is ``auto``
unless given. Random bf16 weights, float32 states of every chunk kept in pinned host memory, ``interval=1``. The first
sweep compiles and fills host memory; the second is measured. ``held`` then stays on each chunk for three steps and
times the last two: the same steps without copies of states. ``streamed`` then moves all weights to host memory and
measures a sweep in which each is fetched for every use. Needs one CUDA GPU and about 90 GB of host memory at
the full shape; ``--layers`` shrinks it.
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
from torch import Tensor, nn

import chunkft_fx
from benchmarks.shapes import SHAPES, batches, build
from chunkft_fx.plan.policy import DEPTH

GIB = 2**30


@dataclass(frozen=True)
class Case:
    """What is measured: sequences, tokens in each, the budget, chunks (a number or ``"auto"``), and what else."""

    batch: int
    sequence: int
    budget: str
    chunks: int | str
    also: str

    @classmethod
    def parse(cls, text: str) -> Case:
        """A case of ``batch,sequence,budget[,chunks[,held or streamed]]``; raises `ValueError` for anything else."""
        batch, sequence, budget, *rest = text.split(",")
        chunks, also = rest + ["auto", ""][len(rest) :]
        if also not in ("", "held", "streamed"):
            raise ValueError(f"{also!r} is neither held nor streamed")
        return cls(int(batch), int(sequence), budget, chunks if chunks == "auto" else int(chunks), also)


@dataclass
class Row:
    """A trainer's figures: milliseconds a step over a sweep, GiB at the peak, seconds for the first step.

    ``held_ms`` is the mean step while the states stay where they are, ``streamed_ms`` with all weights streamed; 0 if
    not measured.
    """

    name: str
    batch: int
    mean_ms: float
    median_ms: float
    worst_ms: float
    allocated_gib: float
    reserved_gib: float
    first_step_s: float
    steps: int
    held_ms: float = 0.0
    streamed_ms: float = 0.0


def measure(name: str, batch: int, step: Callable[[int], None], warm: Callable[[], int], steps: int | None) -> Row:
    """Time a first step, run ``warm() - 1`` more, then time ``steps`` (``None``: as many again) one by one."""
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step(0)
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    before = warm()
    print(f"{name}: first step {first:.1f} s", flush=True)
    for i in range(1, before):
        step(i)
    count = steps or before
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    begin = time.perf_counter()
    marks[0].record()
    for i in range(count):
        step(before + i)
        marks[i + 1].record()
    torch.cuda.synchronize()
    mean = (time.perf_counter() - begin) / count * 1e3
    times = sorted(a.elapsed_time(b) for a, b in pairwise(marks))
    memory = [f() / GIB for f in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)]
    return Row(name, batch, mean, times[count // 2], times[-1], memory[0], memory[1], first, count)


def ours(case: Case, model: nn.Module, data: list[Tensor], checked: bool) -> tuple[Row, str, list[Check]]:
    """Time this library on a case; returns its row, its plan as text and, if ``checked``, its gradients compared."""
    compiled = chunkft_fx.compile(model, case.budget, chunks=case.chunks, interval=1, device="cuda")
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-5, weight_decay=0.0)

    def step(i: int) -> None:
        ids = data[i % len(data)]
        compiled(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    name = f"chunkft_fx, {case.budget}, chunks={case.chunks}"
    row = measure(name, case.batch, step, lambda: len(compiled.plan.chunks), None)
    count = len(compiled.plan.chunks)
    plan = str(compiled.plan)
    if case.also == "held":
        row.held_ms = sum(held_ms(compiled, step, k) for k in range(count)) / count
        compiled.schedule.interval = 1
    if case.also == "streamed":
        torch.cuda.synchronize()
        compiled.residency.settle(dict(compiled.named_parameters()), DEPTH)
        compiled.activate(0)
        row.streamed_ms = measure("streamed", case.batch, step, lambda: count, count).mean_ms
    checks = []
    if checked:
        torch.cuda.set_per_process_memory_fraction(1.0)  # the comparison is not training within the budget
        compiled.activate(count // 2)
        compiled(input_ids=data[0], labels=data[0]).loss.backward()
        gradients = {s.name: (s.dim, s.start, s.length, s.grad) for s in compiled.active_slices()}
        checks = check_gradients(model, data[0], gradients)
    return row, plan, checks


def held_ms(compiled: Any, step: Callable[[int], None], chunk: int) -> float:
    """The mean of two steps on a chunk whose states are on the device already, and stay there."""
    compiled.schedule.interval = 4
    compiled.activate(chunk)
    step(0)
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    marks[0].record()
    step(1)
    step(2)
    marks[1].record()
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]) / 2


@dataclass
class Check:
    """Relative errors of one slice's bf16 gradient: ours against eager's, and both against float32."""

    name: str
    ours_to_eager: float
    ours_to_float32: float
    eager_to_float32: float


def check_gradients(model: nn.Module, ids: Tensor, gradients: dict[str, Any]) -> list[Check]:
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


def dense_gradients(model: nn.Module, ids: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """The gradients of the named parameters in one eager step, of their shapes and dtypes."""
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name: g for name in names if (g := model.get_parameter(name).grad) is not None}
    model.zero_grad()
    model.requires_grad_(True)
    return found


def badam(batch: int, model: Any, data: list[Tensor]) -> Row:
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

    row = measure("BAdam 1.4", batch, step, lambda: 3, model.config.num_hidden_layers)
    model.gradient_checkpointing_disable()
    model.requires_grad_(True)
    return row


def table(rows: list[Row]) -> str:
    """The rows as a table in Markdown; times in milliseconds, memory in GiB."""
    titles = "trainer|batch|mean step|median|slowest|states held|weights streamed|allocated|reserved|first step|steps"
    lines = [f"| {titles.replace('|', ' | ')} |", "| --- " * 11 + "|"]
    for r in rows:
        times = [f"{r.mean_ms:.1f} ms", f"{r.median_ms:.0f} ms", f"{r.worst_ms:.0f} ms"]
        times += [f"{ms:.1f} ms" if ms else "" for ms in (r.held_ms, r.streamed_ms)]
        sizes = [f"{gib:.2f} GiB" for gib in (r.allocated_gib, r.reserved_gib)]
        lines.append(
            f"| {' | '.join([r.name, str(r.batch), *times, *sizes, f'{r.first_step_s:.1f} s', str(r.steps)])} |"
        )
    return "\n".join(lines)


def clear() -> None:
    """Give memory back, and let the next case use all of the device until it has a budget of its own."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)


def main() -> None:
    """Time all cases, and BAdam on the same batches before them, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", type=Case.parse, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--check", action="store_true", help="compare the first case's gradients with eager ones")
    parser.add_argument("--no-badam", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measurement needs a CUDA GPU")
    model: Any = build(args.shape, "cuda", args.layers)
    vocabulary = model.config.vocab_size
    rows: list[Row] = []
    plans: list[str] = []
    checks: list[Check] = []
    # BAdam first, while no host memory is pinned yet, which would slow its allocations down.
    for batch, sequence in [] if args.no_badam else sorted({(c.batch, c.sequence) for c in args.case}):
        rows.append(badam(batch, model, batches(vocabulary, batch, sequence, "cuda")))
        clear()
        print(table(rows[-1:]), flush=True)
    for case in args.case:
        data = batches(vocabulary, case.batch, case.sequence, "cuda")
        checked = args.check and case is args.case[0]
        row, plan, found = ours(case, model, data, checked)
        clear()
        rows, plans, checks = [*rows, row], [*plans, plan], checks + found
        print(plan, table(rows[-1:]), sep="\n", flush=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.shape}")
    print(table(rows))
    if checks:
        print("| gradient of | ours to eager | ours to float32 | eager to float32 |\n| --- | --- | --- | --- |")
    for c in checks:
        print(f"| {c.name} | {c.ours_to_eager:.1e} | {c.ours_to_float32:.1e} | {c.eager_to_float32:.1e} |")
    if args.out is not None:
        found_all = {"rows": [asdict(r) for r in rows], "checks": [asdict(c) for c in checks], "plans": plans}
        args.out.write_text(json.dumps(found_all, indent=1))


if __name__ == "__main__":
    main()

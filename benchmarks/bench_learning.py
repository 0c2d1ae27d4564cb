"""Does training within a budget learn what dense AdamW learns? Held-out loss after the same steps over the same tokens.

    python -m benchmarks.bench_learning MODEL DATA --methods dense,all,one --out learning.json

``MODEL`` is the model's folder (with a GGUF file in it, or with a config and weights), ``DATA`` an ``.npz`` file with
the arrays ``train`` and ``val``: token ids in one dimension. ``dense`` is torch's AdamW with everything on the device;
``all`` this library with an update of every parameter in every step, ``one`` with one chunk a step. All have bf16
weights with float32 masters and moments, no weight decay, gradients clipped to a norm of 1, and a learning rate that
rises over a twentieth of the steps and falls to a tenth as a cosine. Batches are the same, in the same order.

Losses of two runs that differ in rounding alone can lie 0.02 apart: a difference is that of several runs with other
orders of the sequences (``--seed``). ``--budget`` holds for the library; without it, it gets half of the memory that
torch reserved at most while ``dense`` trained, which then has to come first, on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import chunkft_fx
from benchmarks.bench_step import GIB, clear
from chunkft_fx.bytes import format_bytes, parse_bytes
from chunkft_fx.plan.state_spec import MASTERS
from chunkft_fx.tools.load import load_model

HELD_OUT = 128  # sequences
EVALUATED = 16  # sequences in one go
LAST = 50  # steps whose training losses are averaged at the end


@dataclass(frozen=True)
class Row:
    """What a method learned: losses before and after, milliseconds a step, the most that torch reserved in training."""

    method: str
    budget: int
    chunks: int
    before: float
    after: float
    training: float
    step_ms: float
    reserved: int
    curve: list[tuple[int, float]]


@dataclass(frozen=True)
class Learner:
    """A model to call and to evaluate, its optimizer, and what is done after a backward."""

    model: Any
    evaluated: nn.Module
    optimizer: torch.optim.Optimizer
    update: Callable[[], None]


def dense(model: nn.Module, lr: float) -> Learner:
    """torch's AdamW on float32 masters; each step rounds them into the model."""
    weights = list(model.parameters())
    masters = [p.detach().float().clone() for p in weights]
    optimizer = torch.optim.AdamW(masters, lr, weight_decay=0.0, fused=True)

    def update() -> None:
        for master, p in zip(masters, weights, strict=True):
            assert p.grad is not None
            master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, weights, strict=True):
                p.copy_(master)
                master.grad = None

    called = torch.compile(model) if weights[0].is_cuda else model
    return Learner(called, model, optimizer, update)


def chunked(model: nn.Module, lr: float, budget: int, coverage: str, master: str) -> Learner:
    """This library: a budget in bytes, what a step covers, and the format of masters."""
    on_gpu = next(model.parameters()).is_cuda
    backend = "inductor" if on_gpu else "eager"
    compiled = chunkft_fx.compile(model, budget, coverage=coverage, backend=backend)
    optimizer = chunkft_fx.AdamW(compiled, lr=lr, weight_decay=0.0, max_grad_norm=1.0, master=master)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Learner(compiled, compiled, optimizer, update)


@torch.no_grad()
def held_out_loss(model: nn.Module, sequences: Tensor) -> float:
    """The mean loss over ``sequences`` (``i64[count, length]``); the model is in training mode afterwards."""
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in sequences.split(EVALUATED)]
    model.train()
    return sum(losses) / len(sequences)


def rate(step: int, steps: int) -> float:
    """The share of the learning rate at a step: up over a twentieth of them, then down to a tenth as a cosine."""
    rising = max(steps // 20, 1)
    if step < rising:
        return (step + 1) / rising
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))


def sequences_of(path: Path, length: int, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Training sequences in the random order of a seed, and held-out ones: both ``i64[count, length]``."""
    data = np.load(path)
    both = [torch.from_numpy(data[key].astype(np.int64)) for key in ("train", "val")]
    training, rest = (ids[: len(ids) // length * length].view(-1, length) for ids in both)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))
    return training[order], rest[:held_out]


def learn(method: str, learner: Learner, budget: int, data: tuple[Tensor, Tensor], args: argparse.Namespace) -> Row:
    """Train for all steps and evaluate before, every ``args.every`` steps, and after them."""
    training, held_out = data
    held_out = held_out.to(args.device)
    curve = [(0, held_out_loss(learner.evaluated, held_out))]
    _forget_peak()
    losses: list[Tensor] = []
    reserved, seconds, begin = 0, 0.0, time.perf_counter()
    for step in range(args.steps):
        if step == args.steps // 3:  # graphs are compiled by then
            _wait()
            seconds, begin = 0.0, time.perf_counter()
        for group in learner.optimizer.param_groups:
            group["lr"] = args.lr * rate(step, args.steps)
        rows = torch.arange(step * args.batch, (step + 1) * args.batch) % len(training)
        ids = training[rows].to(args.device)
        loss = learner.model(input_ids=ids, labels=ids).loss
        loss.backward()
        learner.update()
        losses.append(loss.detach())
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            _wait()
            seconds += time.perf_counter() - begin
            reserved = max(reserved, torch.cuda.max_memory_reserved())
            curve.append((step + 1, held_out_loss(learner.evaluated, held_out)))
            print(f"{method}: held-out loss {curve[-1][1]:.4f} after {step + 1} steps", flush=True)
            _forget_peak()
            begin = time.perf_counter()
    plan = getattr(learner.evaluated, "plan", None)
    chunks = len(plan.chunks) if plan is not None else 0
    late = float(torch.stack(losses[-LAST:]).float().mean())
    step_ms = seconds / (args.steps - args.steps // 3) * 1e3
    return Row(method, budget, chunks, curve[0][1], curve[-1][1], late, step_ms, reserved, curve)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def table(rows: list[Row]) -> str:
    """The rows as a table in Markdown, losses also as what they are above the dense one's."""
    compared = next((r.after for r in rows if r.method == "dense"), None)
    titles = [
        "method",
        "budget",
        "chunks",
        "held-out before",
        "after",
        "above dense",
        "training, last",
        "step",
        "reserved",
    ]
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    for r in rows:
        above = "" if compared is None else f"{r.after - compared:+.4f}"
        budget = format_bytes(r.budget) if r.budget else ""
        cells = [r.method, budget, str(r.chunks or ""), f"{r.before:.4f}", f"{r.after:.4f}", above]
        cells += [f"{r.training:.4f}", f"{r.step_ms:.1f} ms", f"{r.reserved / GIB:.2f} GiB"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train with each method from the same weights, and print a table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the model's folder")
    parser.add_argument("data", type=Path, help="an .npz file with train and val")
    parser.add_argument("--methods", default="dense,all,one", help="comma-separated: dense, all, one")
    parser.add_argument("--budget", help="bytes for the library, such as 4GB; half of what dense reserved unless given")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16, help="sequences in a step")
    parser.add_argument("--sequence", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--every", type=int, default=200, help="steps between evaluations")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="sequences to evaluate on")
    parser.add_argument("--seed", type=int, default=0, help="of the order of sequences")
    parser.add_argument("--master", choices=MASTERS, default="float32", help="how the library keeps its masters")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    methods = args.methods.split(",")
    if unknown := set(methods) - {"dense", "all", "one"}:
        parser.error(f"unknown method {min(unknown)}")
    if not args.budget and (methods[0] != "dense" or args.device == "cpu"):
        parser.error("give a budget, or let dense come first on a GPU, which measures what to halve")
    data = sequences_of(args.data, args.sequence, args.held_out, args.seed)
    gguf = sorted(args.model.glob("*.gguf"))
    plain = load_model(str(gguf[0] if gguf else args.model), torch.bfloat16, torch.device("cpu"))
    rows: list[Row] = []
    for method in methods:
        if torch.cuda.is_available():
            clear()
        torch.compiler.reset()
        torch.manual_seed(0)
        model = copy.deepcopy(plain).to(args.device)
        if method == "dense":
            row = learn(method, dense(model, args.lr), 0, data, args)
        else:
            budget = parse_bytes(args.budget) if args.budget else rows[0].reserved // 2
            row = learn(method, chunked(model, args.lr, budget, method, args.master), budget, data, args)
        rows.append(row)
        print(table(rows), flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps([asdict(r) for r in rows], indent=1))


if __name__ == "__main__":
    main()

"""Time and memory of a head's loss and gradients in blocks of tokens, beside the compiled unchunked head.

    python -m benchmarks.bench_head --rows 8016 --out head.json

Both compute the loss, the gradient of the hidden states and of ``--rows`` rows of the weight (0: of none; the
unchunked head then has a frozen weight, otherwise its dense gradient is sliced afterwards, as autograd has it).
The default is 8 x 1024 tokens of 128,256 classes and 4096 features in bf16; ``--features`` and ``--classes``
shrink it. Errors are relative norms against float32 on the same bf16 inputs, on the first ``--checked`` tokens.
Needs one CUDA GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from chunkft_fx.head import operators as head

MIB = 2**20


@dataclass(frozen=True)
class Inputs:
    """``hidden`` bf16[tokens, features], ``weight`` bf16[classes, features], ``labels`` i64[tokens]; rows to slice."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    start: int
    rows: int


# The loss, and the gradients of hidden states and of the demanded rows (empty without any).
Results = tuple[Tensor, Tensor, Tensor]
Head = Callable[[Inputs], Results]


@dataclass
class Row:
    """One head's figures: median milliseconds, MiB at the peak above the inputs, relative errors to float32."""

    name: str
    median_ms: float
    peak_mib: float
    loss_error: float
    hidden_error: float
    weight_error: float


def chunked(x: Inputs) -> Results:
    """The operator as the compiled program calls it."""
    window = (torch.tensor(x.start), 0, x.rows) if x.rows else (None, 0, 0)
    mask = [True, x.rows > 0, False]
    loss, d_hidden, d_weight, _ = head.grad(x.hidden, x.weight, None, x.labels, -100, 0.0, True, mask, *window)
    return loss, d_hidden, d_weight


def formula(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The head as transformers writes it."""
    return functional.cross_entropy(functional.linear(hidden, weight).float(), labels)


def differentiated(loss_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Head:
    """A head by autograd of a loss function."""

    def run(x: Inputs) -> Results:
        hidden, weight = x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_(x.rows > 0)
        loss = loss_of(hidden, weight, x.labels)
        loss.backward()
        assert hidden.grad is not None
        whole = x.weight[:0] if weight.grad is None else weight.grad
        return loss.detach(), hidden.grad, whole[x.start : x.start + x.rows]

    return run


def measure(name: str, run: Head, x: Inputs, checked: Inputs, truth: Results, steps: int) -> Row:
    """Time ``steps`` runs one by one after three to warm up, and take the peak of one of them."""
    for _ in range(3):
        run(x)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(x)
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / MIB
    times = []
    for _ in range(steps):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(x)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    errors = [error(a, b) for a, b in zip(run(checked), truth, strict=True)]
    return Row(name, sorted(times)[steps // 2], peak, *errors)


def error(found: Tensor, truth: Tensor) -> float:
    """The relative norm of the difference; 0 for values without elements."""
    return float((found.float() - truth).norm() / truth.norm()) if truth.numel() else 0.0


def make(args: argparse.Namespace) -> Inputs:
    """Random bfloat16 inputs on the GPU; a tenth of the labels is ignored."""
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.features, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(args.classes, args.features, device="cuda", dtype=torch.bfloat16) * args.features**-0.5
    labels = torch.randint(0, args.classes, (args.tokens,), device="cuda")
    labels[::10] = -100
    return Inputs(hidden, weight, labels, args.rows, args.rows)


def table(rows: list[Row]) -> str:
    """The rows as a table in Markdown; times in milliseconds, peaks in MiB, errors as relative norms."""
    lines = [
        "| head | median | peak above inputs | loss | hidden states | weight |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.name} | {r.median_ms:.1f} ms | {r.peak_mib:.0f} MiB | {r.loss_error:.1e} | {r.hidden_error:.1e} | "
        f"{r.weight_error:.1e} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure the head in blocks and whole, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--classes", type=int, default=128_256)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8016, help="rows of the weight whose gradient is demanded")
    parser.add_argument("--block-mib", type=int, help="logits held at a time, in MiB; default: the library's")
    parser.add_argument("--checked", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measurement needs a CUDA GPU")
    if args.block_mib is not None:
        head.LOGITS_NBYTES = args.block_mib * MIB
    if args.rows * 2 > args.classes:
        parser.error("--rows is at most half of --classes")
    x = make(args)
    checked = Inputs(x.hidden[: args.checked], x.weight, x.labels[: args.checked], x.start, x.rows)
    wide = Inputs(checked.hidden.float(), x.weight.float(), checked.labels, x.start, x.rows)
    truth = differentiated(formula)(wide)
    del wide
    heads: dict[str, Head] = {
        "chunked": chunked,
        "torch.compile": differentiated(torch.compile(formula)),
        "eager": differentiated(formula),
    }
    rows = [measure(name, run, x, checked, truth, args.steps) for name, run in heads.items()]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {args}")
    print(table(rows))
    print(f"time over torch.compile's: {rows[0].median_ms / rows[1].median_ms:.2f}")
    if args.out is not None:
        args.out.write_text(json.dumps({"rows": [asdict(r) for r in rows], "args": vars(args)}, indent=1, default=str))


if __name__ == "__main__":
    main()

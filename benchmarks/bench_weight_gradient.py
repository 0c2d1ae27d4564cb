"""Time of a slice's weight gradient: the graph as traced, the library's product in place, and the Triton kernel.

    python -m benchmarks.bench_weight_gradient --out weight_gradient.json

``as traced`` copies the slice, multiplies in bf16 and widens the product to float32, which is what a step does without
the operator; the others read the slice in place and give float32. Medians of ``--rounds`` measurements as
`chunkft_fx.machine.kernel_choice` takes them, for the weights of a Llama-2-7B block; a slice of 1 is a whole weight
(cut from a slightly wider one, so that it is copied too). ``best`` is what a session would choose, and what the fastest
saves. Needs one CUDA GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import torch

from chunkft_fx.kernels.weight_gradient import LIBRARY, TILINGS, Problem
from chunkft_fx.machine.kernel_choice import fastest, measure

TOKENS = (8192, 1024)
# Output and input features: attention's projections; gate and up; down.
WEIGHTS = ((4096, 4096), (11008, 4096), (4096, 11008))
SLICES = (Fraction(1, 16), Fraction(1, 8), Fraction(1, 4), Fraction(1))


@dataclass(frozen=True)
class Row:
    """One problem: microseconds by candidate, what would be chosen, and TFLOP/s of the fastest."""

    tokens: int
    weight: tuple[int, int]
    dim: int
    slice: str
    us: dict[str, float]
    chosen: str
    best_tflops: float


def problem_of(tokens: int, weight: tuple[int, int], dim: int, share: Fraction) -> Problem:
    """The gradient of a share of a weight ``[out, features]`` along ``dim``, from this many tokens in bfloat16."""
    sizes = list(weight)
    sizes[dim] = int(sizes[dim] * share)
    return Problem(tokens, sizes[0], sizes[1], dim, torch.bfloat16)


def row(tokens: int, weight: tuple[int, int], dim: int, share: Fraction, rounds: int) -> Row:
    """The median microseconds of each candidate over ``rounds`` measurements."""
    problem = problem_of(tokens, weight, dim, share)
    device = torch.device("cuda", torch.cuda.current_device())
    measured = [measure(problem, device) for _ in range(rounds)]
    times = {by: statistics.median(m[by] for m in measured) for by in measured[0]}
    flops = 2 * problem.tokens * problem.rows * problem.columns
    named = {by or "traced": round(us, 2) for by, us in times.items()}
    return Row(tokens, weight, dim, str(share), named, fastest(times) or "traced", flops / min(times.values()) / 1e6)


def line(r: Row) -> str:
    """One line of the table; times in milliseconds."""
    names = ("traced", LIBRARY, *TILINGS)
    figures = " | ".join(f"{r.us[n] / 1e3:.3f}" if n in r.us else "-" for n in names)
    gain = 1 - min(r.us.values()) / r.us["traced"]
    out, features = r.weight
    return (
        f"| {r.tokens} | {out} x {features} | {r.dim} | {r.slice} | {figures} | {r.chosen} | {gain:.1%} | "
        f"{r.best_tflops:.0f} |"
    )


def main() -> None:
    """Measure all problems and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measurement needs a CUDA GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; times in ms")
    print(f"| tokens | weight | dim | slice | as traced | in place | {' | '.join(TILINGS)} | best | gain | TFLOP/s |")
    print("| --- | --- | --- | --- | --- | --- |" + " --- |" * (len(TILINGS) + 3))
    rows = []
    for tokens in TOKENS:
        for weight in WEIGHTS:
            for dim in (0, 1):
                for share in SLICES:
                    rows.append(row(tokens, weight, dim, share, args.rounds))
                    print(line(rows[-1]), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps([asdict(r) for r in rows], indent=1))


if __name__ == "__main__":
    main()

"""Does a plan keep its promise? Predicted against measured memory on one GPU, for shapes, batches and budgets.

    python -m benchmarks.bench_budget --jobs 4 --out budget.json
    python -m benchmarks.bench_budget --case llama2-7b,1,1024,13.3GiB

A case is ``shape,batch,sequence,budget``. Each runs in a process of its own: the model is made in host memory
(``--on-device``: on the GPU, for a model that only fits there), compiled and trained for three steps from each of
`SPOTS` chunks on, spread over the sweep, the first and the last among them; the second adds up the gradients of two
batches, which the predicted peak allows for. Then steps in the middle of `SPOTS` parts of the sweep are timed, which
stand for its mean, once host memory has their states. ``reserved`` is ``torch.cuda.max_memory_reserved()`` over the
life of the process. Cases run beside each other (``--jobs``) while their budgets fit the device; while one is timed,
no other runs a step. Each pins the states of up to 32 chunks and their neighbours in a slab: five of 7B in 128 GiB of
host memory were too many.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Condition
from typing import Any

import torch

import chunkft_fx
from benchmarks.shapes import batches, build
from chunkft_fx.bytes import parse_bytes
from chunkft_fx.machine.known_rates import known_rates

GIB = 2**30
SPOTS = 4
LOCK = Path(tempfile.gettempdir()) / "chunkft_fx-bench_budget.lock"
CONTEXT = GIB  # what a process takes of the device beside its allocator
CASES = (
    "llama2-7b,8,1024,45GiB",
    "llama2-7b,1,1024,6GiB",
    "llama3-1b,8,4096,20GiB",
    "gpt2-xl,1,1024,4GiB",
    "llama2-7b,1,1024,13.3GiB",
    "llama3-1b,1,1024,4GiB",
    "llama3-8b,8,1024,24GB",
    "gpt2-xl,8,1024,12GiB",
    "llama2-7b,8,1024,24GB",
    "llama3-1b,8,1024,8GiB",
    "llama3-8b,2,1024,18GiB",
    "gpt2-xl,8,512,2.5GiB",
    "llama2-7b,1,4096,15GiB",
    "llama3-1b,1,512,2GiB",
    "llama2-7b,8,512,9GiB",
    "llama2-7b,1,1024,24GiB",
)


@dataclass
class Result:
    """One case: bytes predicted and measured, and what the plan chose; ``error`` says what went wrong."""

    case: str
    budget: int = 0
    predicted: int = 0
    allocated: int = 0
    reserved: int = 0
    chunks: int = 0
    recomputing: int = 0
    offloading: int = 0
    predicted_ms: float = 0.0
    streamed: int = 0
    first_step_s: float = 0.0
    step_ms: float = 0.0
    losses: tuple[float, ...] = ()
    terms: tuple[tuple[str, int], ...] = ()
    steps: tuple[tuple[int, int], ...] = ()
    error: str = ""


def run(case: str, chunks: int | str, states: str, built_on: str) -> Result:
    """Train a case in this process; ``steps`` holds (chunk, bytes allocated at the peak) of every step."""
    shape, batch, sequence, budget = case.split(",")
    model: Any = build(shape, built_on)
    ids = batches(model.config.vocab_size, int(batch), int(sequence), "cuda", 1)[0]
    compiled = chunkft_fx.compile(model, budget, chunks=chunks, interval=1, device="cuda")
    # Host memory is taken for the states of visited chunks only: less than those of all, which need not fit.
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-5, weight_decay=0.0, states=states, host_budget="1TB")
    result, peaks = Result(case), []
    losses: list[torch.Tensor] = []

    def step(count: int = 1) -> None:
        for _ in range(count):
            loss = compiled(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()

    def seconds(steps: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    with others(fcntl.LOCK_SH):
        result.first_step_s = seconds(1)
    result.reserved = torch.cuda.max_memory_reserved()
    peaks.append((0, torch.cuda.max_memory_allocated()))
    plan = compiled.plan
    spots = sorted({i * (len(plan.chunks) - 1) // (SPOTS - 1) for i in range(SPOTS)})
    for k in spots:
        compiled.activate(k)
        for count in (1, 2, 1):
            torch.cuda.reset_peak_memory_stats()  # reserved's peak has been read
            with others(fcntl.LOCK_SH):
                step(count)
                torch.cuda.synchronize()
            result.reserved = max(result.reserved, torch.cuda.max_memory_reserved())
            peaks.append((k, torch.cuda.max_memory_allocated()))
    middles = [(2 * i + 1) * len(plan.chunks) // (2 * SPOTS) for i in range(SPOTS)]
    with others(fcntl.LOCK_SH):
        for k in middles:
            compiled.activate(k)
            seconds(3)
    times = []
    with others(fcntl.LOCK_EX):
        for k in middles:
            compiled.activate(k)
            seconds(1)  # whose states are not fetched ahead
            times.append(seconds(2) / 2)
    result.reserved = max(result.reserved, torch.cuda.max_memory_reserved())
    result.budget, result.predicted = plan.budget_bytes, plan.predicted_peak_bytes or 0
    result.allocated = max(nbytes for _, nbytes in peaks)
    result.chunks, result.recomputing, result.streamed = len(plan.chunks), plan.policy.save_from, len(plan.streamed)
    result.offloading, result.predicted_ms = plan.policy.offload_below, (plan.predicted_step_us or 0.0) / 1e3
    result.step_ms, result.losses = sum(times) / len(times) * 1e3, tuple(loss.item() for loss in losses)
    result.terms, result.steps = plan.terms, tuple(peaks)
    return result


@contextmanager
def others(how: int) -> Iterator[None]:
    """Share the GPU with the steps of other cases (``LOCK_SH``), or have it alone (``LOCK_EX``)."""
    with LOCK.open("w") as file:
        fcntl.flock(file, how)
        yield


class Room:
    """Device memory that cases beside each other share: each waits until its budget and `CONTEXT` bytes are free."""

    def __init__(self, nbytes: int) -> None:
        self.total = self.free = nbytes
        self.changed = Condition()

    @contextmanager
    def taken(self, case: str) -> Iterator[None]:
        """Hold what a case needs; one that never fits runs alone, and says itself what it lacks."""
        nbytes = min(parse_bytes(case.split(",")[-1]) + CONTEXT, self.total)
        with self.changed:
            self.changed.wait_for(lambda: nbytes <= self.free)
            self.free -= nbytes
        try:
            yield
        finally:
            with self.changed:
                self.free += nbytes
                self.changed.notify_all()


def apart(case: str, args: argparse.Namespace, room: Room) -> Result:
    """Run a case in a process of its own and read its result from the last line that it prints."""
    asked = ["--case", case, "--chunks", args.chunks, "--states", args.states]
    with room.taken(case):
        done = subprocess.run([sys.executable, "-m", "benchmarks.bench_budget", *asked], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-12:]
        return Result(case, error="\n".join(said) or f"ended with status {done.returncode}")
    return Result(**json.loads(done.stdout.strip().splitlines()[-1]))


def table(results: list[Result]) -> str:
    """The results as a table in Markdown, a line each; bytes in GiB, times in milliseconds."""
    titles = "case|budget|predicted|allocated|error|reserved|chunks|recompute|offload|streamed|predicted step|step"
    return "\n".join([f"| {titles.replace('|', ' | ')} |", "| --- " * 12 + "|", *map(row, results)])


def row(r: Result) -> str:
    """One line of the table; of a case that failed the last line of its error."""
    if r.error:
        return f"| {r.case} | failed: {r.error.splitlines()[-1]} |"
    sizes = [f"{n / GIB:.2f}" for n in (r.budget, r.predicted, r.allocated)]
    error = f"{100 * (r.predicted / r.allocated - 1):+.1f}%"
    choices = [str(n) for n in (r.chunks, r.recomputing, r.offloading, r.streamed)]
    times = [f"{ms:.0f} ms" for ms in (r.predicted_ms, r.step_ms)]
    return f"| {' | '.join([r.case, *sizes, error, f'{r.reserved / GIB:.2f}', *choices, *times])} |"


def main() -> None:
    """Measure the cases, each in a process of its own, and print a table; one case alone runs in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="shape,batch,sequence,budget; one runs in this process")
    parser.add_argument("--chunks", default="auto")
    parser.add_argument("--states", default="keep")
    parser.add_argument("--on-device", action="store_true", help="make one case's model on the GPU")
    parser.add_argument("--jobs", type=int, default=1, help="cases at once; memory figures do not depend on it")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measurement needs a CUDA GPU")
    cases = args.case or CASES
    if len(cases) == 1:
        chunks = args.chunks if args.chunks == "auto" else int(args.chunks)
        result = run(cases[0], chunks, args.states, "cuda" if args.on_device else "cpu")
        print(table([result]), json.dumps(asdict(result)), sep="\n")
        return
    known_rates(torch.device("cuda"))  # once, undisturbed; the cases read it from its cache
    results: list[Result] = []
    room = Room(torch.cuda.mem_get_info()[0])
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in as_completed(pool.submit(apart, case, args, room) for case in cases):
            results.append(done.result())
            print(results[-1].error, row(results[-1]), sep="\n", flush=True)
            if args.out is not None:
                args.out.write_text(json.dumps([asdict(r) for r in results], indent=1))
    print(torch.cuda.get_device_name(), table(sorted(results, key=lambda r: cases.index(r.case))), sep="\n")


if __name__ == "__main__":
    main()

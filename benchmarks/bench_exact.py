"""Exact AdamW on all parameters in every step: this library beside dense training and offloading trainers.

    python -m benchmarks.bench_exact --case 8,1024 --case 16,1024 --case 32,1024 --budget 24GB --out exact.json
    python -m benchmarks.bench_exact --trainers ours-backward,torchao --case 8,1024 --micro torchao=4 --layers 4

A case is ``batch,sequence``. Every trainer runs in a process of its own, on the same random bf16 weights and token ids;
`exact_trainers` and `exact_peers` say what each keeps. The library runs in one process for each case, because each has
its own plan; the others keep their states from case to case. The budget holds for the library alone, the others take
what they take. A batch that finds too little device memory in one of them is run by it in parts, with accumulation: in
parts of half the size after each such time, each in a new process, or as ``--micro TRAINER=N`` says from the beginning.

The table has the median step, tokens and model operations a second (6 for each parameter that multiplies and token,
and causal attention; what is computed again does not count), the most that torch reserved of the device in the
measured steps, what was predicted, how much more host memory the machine had in use at the end of a step than when the
process began, how much torch had pinned at most and how much was resident, the loss before the last step, and how often
the allocator had to give back pages in it. Needs one CUDA GPU, and for 7B about 110 GB of host memory for a trainer.

With ``--unlimited`` the library plans for the budget and the allocator is not held to it: what it reserves beyond the
tensors that were predicted is what lies unused between them.

Trainers that are not installed give a line that says so: ``pip install torchao deepspeed`` and MegaTrain's repository.
SlideFormer (arXiv 2603.16428) is not among them: it is no package, only scripts around a model folder.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_step import GIB, measure
from benchmarks.exact_peers import PEERS
from benchmarks.exact_trainers import TRAINERS as OWN
from benchmarks.exact_trainers import BatchTooLarge, Setting
from benchmarks.shapes import SHAPES, batches
from chunkft_fx.plan.state_spec import MASTERS, STATE_DTYPES

TRAINERS = OWN | PEERS
ROW, FAILED, TOO_LARGE = "ROW ", "FAILED ", "the device has too little memory for the batch"


@dataclass(frozen=True)
class Row:
    """A trainer's figures for a case, or why it has none.

    Seconds for the median, mean and first step; bytes of the device (reserved by torch) and of the host; the loss
    before the last step, by which trainers can be seen to do the same; how often in that step the allocator had to give
    back pages before it found room, each time behind all that the device had to do.
    """

    trainer: str
    batch: int
    sequence: int
    micro: int
    median_s: float = 0.0
    mean_s: float = 0.0
    first_s: float = 0.0
    tokens_s: float = 0.0
    tflops: float = 0.0
    reserved: int = 0
    predicted_s: float = 0.0
    predicted: int = 0
    host: int = 0
    pinned: int = 0
    rss: int = 0
    loss: float = 0.0
    retries: int = 0
    failure: str = ""


def host_in_use() -> int:
    """Bytes of the machine's memory that cannot be had."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return (int(lines["MemTotal"].split()[0]) - int(lines["MemAvailable"].split()[0])) * 1024


def peak_rss() -> int:
    """Bytes of this process that were resident at most."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["VmHWM"].split()[0]) * 1024


def child(trainer: str, settings: list[Setting], warm: int, steps: int) -> None:
    """Measure a trainer on cases, one after another, and print a line for each, or one that says why not."""
    before = host_in_use()
    try:
        made = TRAINERS[trainer](settings[0])
        for setting in settings:
            print(ROW + json.dumps(asdict(_measure(trainer, setting, made, warm, steps, before))), flush=True)
    except BatchTooLarge:
        print(FAILED + TOO_LARGE, flush=True)
    except torch.OutOfMemoryError:
        print(f"{FAILED}the device has too little memory for its states", flush=True)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        print(f"{FAILED}{type(error).__name__}: {lines[0][:200]}", flush=True)
        raise


def _measure(trainer: str, setting: Setting, made: Any, warm: int, steps: int, before: int) -> Row:
    vocabulary = SHAPES[setting.shape](setting.layers)[1].vocab_size
    data = batches(vocabulary, setting.batch, setting.sequence, "cuda")
    in_use, retries = before, 0
    loss: Any = 0.0

    def step(i: int) -> None:
        nonlocal in_use, loss, retries
        so_far = torch.cuda.memory_stats()["num_alloc_retries"]
        loss = made.step(data[i % len(data)])
        in_use = max(in_use, host_in_use())
        retries = torch.cuda.memory_stats()["num_alloc_retries"] - so_far

    gc.collect()
    torch.cuda.empty_cache()
    name = f"{trainer} {setting.batch} x {setting.sequence}"
    timed = measure(name, setting.batch, step, lambda: warm, steps)
    tokens = setting.batch * setting.sequence
    median = timed.median_ms / 1e3
    pinned = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)
    predicted_s, predicted = made.predicted()
    return Row(
        trainer,
        setting.batch,
        setting.sequence,
        setting.batch // setting.parts,
        median,
        timed.mean_ms / 1e3,
        timed.first_step_s,
        tokens / median,
        tokens / median * made.flops(setting.sequence) / 1e12,
        int(timed.reserved_gib * GIB),
        predicted_s,
        predicted,
        in_use - before,
        pinned,
        peak_rss(),
        float(loss),
        retries,
    )


def run(trainer: str, settings: list[Setting], args: argparse.Namespace) -> Iterator[Row]:
    """The rows of a trainer, from as many processes as it takes."""
    left = list(settings)
    while left:
        together = not trainer.startswith("ours") and left[0].micro is None
        group = left if together else left[:1]
        rows, failure = _start(trainer, group, args)
        yield from rows
        left = left[len(rows) :]
        half = left[0].batch // left[0].parts // 2 if left else 0
        if failure == TOO_LARGE and half and not trainer.startswith("ours"):
            print(f"{trainer}: {TOO_LARGE}, again in parts of {half}", flush=True)
            left = [Setting(**{**asdict(s), "micro": half}) for s in left]
        elif failure:
            # what fails for a batch fails for larger ones: they are not tried
            yield from (Row(trainer, s.batch, s.sequence, s.batch // s.parts, failure=failure) for s in left)
            return


def _start(trainer: str, group: list[Setting], args: argparse.Namespace) -> tuple[list[Row], str]:
    """Run a child; returns its rows, and why it ended before the last of them (or nothing)."""
    asked = json.dumps({"trainer": trainer, "settings": [asdict(s) for s in group]})
    command = [sys.executable, "-m", "benchmarks.bench_exact", "--child", asked]
    command += ["--warm", str(args.warm), "--steps", str(args.steps)]
    environment = dict(os.environ)
    if not trainer.startswith("ours"):
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    timer = threading.Timer(args.timeout, process.kill)
    timer.start()
    rows: list[Row] = []
    failure = ""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(ROW):
            rows.append(Row(**json.loads(line.removeprefix(ROW))))
        elif line.startswith(FAILED):
            failure = line.removeprefix(FAILED).strip()
        print(line, end="", flush=True)
    code = process.wait()
    late = not timer.is_alive()
    timer.cancel()
    if len(rows) == len(group):
        return rows, ""
    if late:
        failure = f"not done after {args.timeout} s"
    elif code < 0:
        failure = f"killed by signal {-code}, as where host memory is at its end"
    return rows, failure or f"ended with code {code}"


def table(rows: list[Row]) -> str:
    """The rows as a table in Markdown; memory in GiB."""
    titles = ["trainer", "batch", "in parts of", "median step", "tokens/s", "TFLOP/s", "device reserved", "predicted"]
    titles += ["host in use", "host pinned", "resident", "loss", "retries"]
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    for r in rows:
        cells = [r.trainer, f"{r.batch} x {r.sequence}", str(r.micro)]
        if r.failure:
            cells += [r.failure] + [""] * (len(titles) - len(cells) - 1)
        else:
            cells += [f"{r.median_s:.3f} s", f"{r.tokens_s:.0f}", f"{r.tflops:.1f}"]
            cells += [f"{r.reserved / GIB:.2f} GiB"]
            cells += [f"{r.predicted_s:.3f} s, {r.predicted / GIB:.2f} GiB" if r.predicted else ""]
            cells += [f"{n / GIB:.2f} GiB" for n in (r.host, r.pinned, r.rss)]
            cells += [f"{r.loss:.4f}", str(r.retries)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_case(text: str) -> tuple[int, int]:
    """Sequences and tokens in each, of ``batch,sequence``; raises `ValueError` for anything else."""
    batch, sequence = text.split(",")
    return int(batch), int(sequence)


def main() -> None:
    """Start a child for each trainer, one after another, and print their rows as a table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--case", action="append", type=parse_case, help="batch,sequence; may be given again")
    parser.add_argument("--budget", default="24GB", help="the device memory that the library may use")
    parser.add_argument("--trainers", default=",".join(TRAINERS), help="comma-separated")
    parser.add_argument("--micro", action="append", default=[], metavar="TRAINER=N", help="sequences in one go")
    parser.add_argument("--master", choices=MASTERS, default="float32", help="how the library keeps its masters")
    parser.add_argument("--state-dtype", choices=tuple(STATE_DTYPES), default="float32", help="of its moments")
    parser.add_argument("--unlimited", action="store_true", help="plan for the budget, but let more be reserved")
    parser.add_argument("--warm", type=int, default=2, help="steps before those that are measured")
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which a process is ended")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measurement needs a CUDA GPU")
    if args.child:
        asked = json.loads(args.child)
        child(asked["trainer"], [Setting(**s) for s in asked["settings"]], args.warm, args.steps)
        return
    names = args.trainers.split(",")
    if unknown := [name for name in names if name not in TRAINERS]:
        parser.error(f"unknown trainer {unknown[0]}; choose from {', '.join(TRAINERS)}")
    micro = {name: int(size) for name, size in (text.split("=") for text in args.micro)}
    rows: list[Row] = []
    for name in names:
        settings = [
            Setting(
                args.shape,
                args.layers,
                batch,
                micro.get(name),
                sequence,
                args.budget,
                args.master,
                args.state_dtype,
                args.unlimited,
            )
            for batch, sequence in args.case or [(8, 1024)]
        ]
        for row in run(name, settings, args):
            rows.append(row)
            if args.out is not None:
                args.out.write_text(json.dumps([asdict(r) for r in rows], indent=1))
        print(table(rows), flush=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.shape}, budget {args.budget}")


if __name__ == "__main__":
    main()

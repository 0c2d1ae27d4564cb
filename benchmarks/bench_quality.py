"""What do methods learn from the same tokens? Held-out losses of each at its best rate, in a table that can be resumed.

    python -m benchmarks.bench_quality german --model MODEL --data german-pages.npz --out german.jsonl --jobs 6
    python -m benchmarks.bench_quality german --out german.jsonl --table --plot german.png
    python -m benchmarks.bench_quality cpu --out cpu.jsonl --rows dense one:chunks=8 one:chunks=8,beta1=0
    python -m benchmarks.bench_quality cpu --out grid.jsonl --grid --steps 240 --jobs 2

A setting is a model and a text (``benchmarks/quality/settings.py``); ``MODEL`` a folder with a GGUF file or with a
config and weights, ``--data`` an ``.npz`` file with the arrays ``train`` and ``val`` of token ids:

- ``german``: a large shift, 600 steps of 16 x 512 tokens; ``second``: the same for another, larger model, whose own
  token ids ``python -m benchmarks.quality.retokenize`` makes of another's.
- ``docs``, ``chat``: a small shift, to English documentation, and to questions about it with the loss on the answers
  alone, 300 steps. ``python -m benchmarks.quality.documentation`` makes both texts.
- ``random``: a small model from random weights on the tokens of SmolLM2.
- ``cpu``: a byte-level model of 0.2 million parameters, from English to source code, without files.

A row is a method with options: ``dense``, ``all`` and ``one`` (this library, and what a step covers), ``badam``,
``lomo``, ``adalomo``, ``galore``, ``apollo``, ``lora``. Options of this library are those of `chunkft_fx.compile` and
`chunkft_fx.AdamW`, with ``beta1`` and ``beta2`` for ``betas``. ``steps=75`` is a run of that length with its own
schedule, ``max_grad_norm=null`` leaves clipping out. Without ``--rows`` a setting's own rows are run, the most
important first.

All have bf16 weights with float32 masters on a GPU (peers as ``benchmarks/quality/peers.py`` says), float32 weights on
the CPU, no weight decay, gradients clipped to a norm of 1, and a rate that rises over a twentieth of the steps and
falls to a tenth as a cosine. Batches are the same, in an order that the seed decides, and so are the first weights.

A row begins with three rates of seed 0, a factor of about 3 apart; others follow until the best one has worse
neighbours or seven were tried. Then come the other seeds at the best rate. Each run is a process that appends one line
to ``--out``; runs that have a line are skipped, those that failed too unless ``--retry``. Several commands may share
the file. With ``--jobs`` above 1 a line's seconds are no measurement, and the table leaves them out.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.quality import results
from benchmarks.quality.grid import RATES, grid_rows, grid_table
from benchmarks.quality.pool import Pool
from benchmarks.quality.results import Record, Run
from benchmarks.quality.rows import row
from benchmarks.quality.run import Task
from benchmarks.quality.search import Aim, aim, runs_left
from benchmarks.quality.settings import SETTINGS
from benchmarks.quality.table import result, table

SEEDS = 3  # of rows that are compared


def aims_of(args: argparse.Namespace) -> list[Aim]:
    """The rows that are asked for; ``ValueError`` for one that is not known."""
    setting = SETTINGS[args.setting]
    steps = args.steps or setting.steps
    if args.grid:
        return [aim(args.setting, text, steps, args.rates or RATES, 1) for text in grid_rows()]
    texts = args.rows or setting.rows_at(steps)
    compared = len(texts) if args.rows else setting.compared
    seeds = [args.seeds if i < compared else 1 for i in range(len(texts))]
    return [aim(args.setting, text, steps, args.rates, n) for text, n in zip(texts, seeds, strict=True)]


def installed(aims: Sequence[Aim]) -> list[Aim]:
    """The rows whose packages are there; says once for each package that is not."""
    missing = {aimed: row(aimed.row).missing for aimed in aims}
    for package in sorted({name for name in missing.values() if name}):
        rows = ", ".join(aimed.row for aimed, name in missing.items() if name == package)
        print(f"{package} is not installed (pip install {package}): no {rows}", flush=True)
    return [aimed for aimed, name in missing.items() if name is None]


def commit() -> str:
    """The commit that is checked out, with a + if files differ from it, or ``unknown``."""
    here = Path(__file__).parent
    try:
        said = [
            subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said[0] + ("+" if said[1] else "")


def check_data(records: Sequence[Record], setting: str, digest: str, out: Path) -> None:
    """``ValueError`` if the file has figures of another text: they are not to be compared."""
    others = {r["data"] for r in records if r["setting"] == setting and r.get("data", digest) != digest}
    if others:
        raise ValueError(
            f"{out} has figures of {setting} on another text (digest {min(others)}, now {digest}); give another --out"
        )


def measure(args: argparse.Namespace, aims: list[Aim]) -> None:
    """Make the runs that are left, as many as there is time for."""
    task = Task(
        {}, str(args.out), args.model, args.data, str(args.work), args.device, args.jobs, args.commit or commit()
    )
    task.inputs.check(args.setting)
    old = results.read(args.out)
    check_data(old, args.setting, task.inputs.text(SETTINGS[args.setting]).digest, args.out)
    task.inputs.prepare(args.setting)
    if args.device != "cpu":
        # the machine's rates, by which plans are made, while nothing else runs on the device
        code = f"from chunkft_fx.machine.known_rates import known_rates; known_rates({args.device!r})"
        subprocess.run([sys.executable, "-c", code], check=True)
    present = installed(aims)
    retried = {run for run, line in results.latest(old).items() if line["failure"]} if args.retry else set()

    def left() -> list[Run]:
        records = results.read(args.out)
        fresh = records[len(old) :]
        return runs_left(present, results.latest([r for r in old if results.run_of(r) not in retried] + fresh))

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    minutes = float("inf") if args.minutes is None else args.minutes
    longest = max((line.get("total_s", 0.0) for line in old if line["setting"] == args.setting), default=0.0)
    Pool(task, time.monotonic() + 60 * minutes, longest).work(left)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; ends the process with a message for what is wrong in them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--out", type=Path, required=True, help="the file of lines, which is made or gone on with")
    parser.add_argument("--model", help="a model's folder")
    parser.add_argument("--data", help="an .npz file with train and val")
    parser.add_argument(
        "--work", type=Path, help="a folder for logs and what is made on the way; beside --out if not given"
    )
    parser.add_argument(
        "--rows", nargs="+", help="such as dense one:chunks=8,interval=25; the setting's own if not given"
    )
    parser.add_argument("--grid", action="store_true", help="rows for numbers of chunks and intervals, at all rates")
    parser.add_argument("--rates", type=float, nargs="+", help="these alone, instead of a search for the best one")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of each row that is compared, at its best rate")
    parser.add_argument("--steps", type=int, help="instead of the setting's own")
    parser.add_argument("--minutes", type=float, help="begin no run that would end later")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--retry", action="store_true", help="make runs again that failed before")
    parser.add_argument("--device", help="cuda or cpu; cuda if there is one, but for the setting cpu")
    parser.add_argument("--commit", help="what lines say about it where git cannot")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--plot", type=Path, help="only draw the table, into this file")
    args = parser.parse_args(arguments)
    if args.jobs < 1 or args.seeds < 1:
        parser.error("--jobs and --seeds are 1 or more")
    if args.grid and (args.rows or args.plot):
        parser.error("--grid has rows of its own, and no plot")
    is_cpu = SETTINGS[args.setting].is_byte_level or not torch.cuda.is_available()
    args.device = args.device or ("cpu" if is_cpu else "cuda")
    args.work = args.work or args.out.with_name(args.out.name + ".work")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is left, or only show what there is."""
    args = parsed(arguments)
    try:
        aims = aims_of(args)
        if not args.table and args.plot is None:
            measure(args, aims)
        lines = results.latest(results.read(args.out))
    except ValueError as error:
        sys.exit(str(error))
    print(grid_table(aims, lines) if args.grid else table(aims, lines), flush=True)
    if args.plot is not None:
        from benchmarks.quality.plot import plot

        found = [r for aimed in aims if (r := result(aimed, lines)) is not None]
        plot(found, args.setting, args.plot)


if __name__ == "__main__":
    main()

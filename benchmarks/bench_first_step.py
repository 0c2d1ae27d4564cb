"""Where the time of the first training step goes: seconds of tracing, planning, compiling and running, part by part.

    python -m benchmarks.bench_first_step --shape narrow --chunks 256 --backend eager
    python -m benchmarks.bench_first_step --shape llama2-7b --batch 8 --sequence 1024 --budget 24GB
    python -m benchmarks.bench_first_step --shape llama2-7b --batch 8 --sequence 1024 --budget 24GB --plan-only --paced

A part's seconds are its own: what it calls of other parts counts there. Wall clock, and processor time of this process,
which other programs on the machine disturb less. What a thread does beside the step has a line of its own, which is no
part of the sum. Without a CUDA GPU the model is on the CPU, where ``--paced`` plans by
the times of one H200. Caches are used as they are found: give ``TORCHINDUCTOR_CACHE_DIR`` and ``CHUNKFT_CACHE`` an
empty folder each for a cold start, and the same folders again for a warm one.
With ``--plan-only`` it ends when there is a plan, and weights are memory that nobody reads or writes: so a machine
without a GPU, and with less memory than they would take, tells what tracing and planning of a large model cost.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import resource
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn

import chunkft_fx
from benchmarks.shapes import SHAPES, batches, build
from chunkft_fx.machine.rates import Rates
from chunkft_fx.planning.example_batch import PlanMade
from chunkft_fx.predict.predictor import Predictor
from chunkft_fx.program.programs import Programs
from chunkft_fx.runtime import lower_ahead

# What one H200 was calibrated to.
H200 = Rates({"bfloat16": 6.79e14, "float32": 5.0e13}, 3.92e12, 5.49e10, 5.49e10, 4.56e10, 7.3)

# The functions that a part is made of, where they are called; what is left of a call is Dynamo's.
PARTS = {
    "chunkft_fx.module.sessions:chunk_head": "rewrite of the head",
    "chunkft_fx.module.sessions:captured": "equal blocks found and copied",
    "chunkft_fx.capture.repeats:capture": "description of the joint graph",
    "chunkft_fx.capture.capture:aot_export_joint_with_descriptors": "joint graph by torch",
    "chunkft_fx.module.sessions:outline": "outline",
    "chunkft_fx.planning.batch_plan:BatchPlans.__init__": "reader of sizes",
    "chunkft_fx.planning.batch_plan:BatchPlans.prepare": "search",
    "chunkft_fx.planning.kept_plans:digest": "digest of the question",
    "chunkft_fx.planning.batch_plan:settle": "settling",
    "chunkft_fx.program.programs:build": "programs written",
    "chunkft_fx.program.run_passes:over_program": "program passes",
    "chunkft_fx.program.programs:assemble": "programs assembled",
    "chunkft_fx.program.programs:choose_variants": "demands",
    "chunkft_fx.predict.predictor:step_timeline": "steps replayed",
    "chunkft_fx.predict.step_memory:workspace": "region peaks",
    "chunkft_fx.predict.region.time:graph_cost": "region times",
    "chunkft_fx.program.run_passes:over_region": "region passes",
    "chunkft_fx.program.variants:Specializer.variant": "variants",
    "chunkft_fx.program.variants:partition": "partition",
    "chunkft_fx.program.lower:compile_graph": "compile",
    "chunkft_fx.runtime.lower_ahead:threading.Thread.join": "waiting for graphs that are compiled",
    "chunkft_fx.runtime.step:execute": "run",
    "chunkft_fx.runtime.session:Session.__call__": "rest of the call",
    "chunkft_fx.runtime.session:Session.finish": "rest of the call",
    "chunkft_fx.optim.optimizer:ChunkedOptimizer.step": "update",
}
STEP = "Dynamo and the rest"
BESIDE = " beside the step"


@dataclass
class Part:
    """Calls of one part, their seconds on the wall clock, and of processor time in this process."""

    calls: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0


class Clock:
    """Gives each moment to the innermost part that is under way."""

    def __init__(self) -> None:
        self.parts: dict[str, Part] = defaultdict(Part)
        self._open: list[Part] = []
        self._since = (0.0, 0.0)

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        part = self.parts[name]
        part.calls += 1
        self._settle()
        self._open.append(part)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    @contextlib.contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """For a thread of its own, which calls no part from within another."""
        begin = time.perf_counter(), time.thread_time()
        yield
        part = self.parts[name]
        part.calls += 1
        part.wall_s += time.perf_counter() - begin[0]
        part.cpu_s += time.thread_time() - begin[1]

    def _settle(self) -> None:
        now = time.perf_counter(), time.process_time()
        if self._open:
            self._open[-1].wall_s += now[0] - self._since[0]
            self._open[-1].cpu_s += now[1] - self._since[1]
        self._since = now

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            # autograd's thread runs while the step waits for it, and counts as the step
            is_beside = threading.current_thread().name == lower_ahead.THREAD
            with self.beside(name + BESIDE) if is_beside else self.of(name):
                return function(*args, **kwargs)

        return call


@contextlib.contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """While inside, the functions of all parts are timed."""
    patches = []
    for place, part in PARTS.items():
        module, path = place.split(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        patches.append(mock.patch.object(owner, name, clock.timed(part, getattr(owner, name))))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


@contextlib.contextmanager
def paced(rates: Rates | None) -> Iterator[None]:
    """While inside, plans are made by times also on the CPU."""
    if rates is None:
        yield
        return

    def predictor(programs: Programs, absent: frozenset[str], **of_a_batch: Any) -> Predictor:
        return Predictor(programs, absent, **(of_a_batch | {"known": rates}))

    with mock.patch("chunkft_fx.planning.batch_plan.Predictor", predictor):
        yield


def made(shape: str, layers: int | None, untouched: bool) -> nn.Module:
    kind, config = SHAPES[shape](layers)
    if untouched:
        with torch.device("meta"):
            model = kind(config).to(torch.bfloat16).train()
        return model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available():
        return build(shape, "cuda", layers)
    torch.manual_seed(0)
    return kind(config).train()


def report(parts: dict[str, Part]) -> str:
    lines = ["| part | calls | wall | processor |", "| --- | --- | --- | --- |"]
    for name, part in sorted(parts.items(), key=lambda item: -item[1].wall_s):
        lines.append(f"| {name} | {part.calls} | {part.wall_s:.2f} s | {part.cpu_s:.2f} s |")
    wall, cpu = (
        sum(getattr(p, f) for name, p in parts.items() if not name.endswith(BESIDE)) for f in ("wall_s", "cpu_s")
    )
    return "\n".join([*lines, f"| **first step** | | {wall:.2f} s | {cpu:.2f} s |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="narrow")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--budget", default="24GB")
    parser.add_argument("--chunks", default="auto")
    parser.add_argument("--backend", choices=("eager", "inductor"), default="inductor")
    parser.add_argument("--paced", action="store_true", help="plan by the times of one H200")
    parser.add_argument("--plan-only", action="store_true", help="end when there is a plan")
    parser.add_argument("--sweep", action="store_true", help="then run the rest of a sweep, and tell what it took")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    args = parser.parse_args()

    model: Any = made(args.shape, args.layers, args.plan_only)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (ids,) = batches(model.config.vocab_size, args.batch, args.sequence, device, 1)
    chunks = args.chunks if args.chunks == "auto" else int(args.chunks)
    clock = Clock()
    with watched(clock), paced(H200 if args.paced else None):
        compiled = chunkft_fx.compile(model, args.budget, chunks=chunks, interval=1, backend=args.backend)
        # without an optimizer the plan is for AdamW, whose states no host memory has to hold then
        optimizer = None if args.plan_only else chunkft_fx.AdamW(compiled, lr=1e-5)

        def step() -> None:
            loss = compiled(input_ids=ids, labels=ids).loss
            if optimizer is None:
                return
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()

        compiled._training._is_planning = args.plan_only
        with clock.of(STEP), contextlib.suppress(PlanMade):
            step()
        first = {name: Part(**asdict(part)) for name, part in clock.parts.items()}
        found: dict[str, Any] = {"chunks": len(compiled.plan.chunks), "variants": len(compiled.variants)}
        found["resident_mib"] = [resident_mib()]
        if args.sweep:
            begin = time.perf_counter()
            for _ in compiled.plan.chunks[1:]:
                step()
            found["sweep_s"] = time.perf_counter() - begin
            found["resident_mib"].append(resident_mib())
            found["variants_of_a_sweep"] = len(compiled.variants)
    if args.json:
        print(json.dumps(found | {"parts": {name: asdict(part) for name, part in first.items()}}))
    else:
        print(report(first), found, sep="\n")


def resident_mib() -> int:
    """The most host memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()

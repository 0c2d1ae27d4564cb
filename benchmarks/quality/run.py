"""Runs one run of the table in a process of its own, and writes its line: figures, or why there are none.

    python -m benchmarks.quality.run TASK

``TASK`` is a `Task` as JSON. A process for each run: none finds the memory, graphs or caches of another one in its way.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import chunkft_fx
from benchmarks.quality import results
from benchmarks.quality.learn import Lesson, learn
from benchmarks.quality.results import Record, Run
from benchmarks.quality.rows import METHODS, row, version_of
from benchmarks.quality.settings import SETTINGS, Inputs


@dataclass(frozen=True)
class Task:
    """A run, where its line goes, and what it needs: paths as text, the device, how many run at once, the commit."""

    run: dict[str, Any]
    out: str
    model: str | None
    data: str | None
    work: str
    device: str
    jobs: int
    commit: str

    @property
    def inputs(self) -> Inputs:
        """The files of the task."""
        model, data = (None if path is None else Path(path) for path in (self.model, self.data))
        return Inputs(model, data, Path(self.work))


def facts(task: Task) -> Record:
    """What is known of a run before it begins; a line without figures has no more than this and ``failure``."""
    run, device = Run(**task.run), torch.device(task.device)
    chosen, setting = row(run.row), SETTINGS[run.setting]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")} | version_of(
        chosen.method
    )
    return {
        **asdict(run),
        "method": chosen.method,
        "options": dict(chosen.options),
        "batch": setting.batch,
        "length": setting.length,
        "jobs": task.jobs,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "commit": task.commit,
        "versions": versions | {"python": platform.python_version(), "chunkft-fx": chunkft_fx.__version__},
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "failure": "",
    }


def figures(task: Task) -> Record:
    """Train; what was learned, in which time and memory."""
    begin = time.perf_counter()
    run, device = Run(**task.run), torch.device(task.device)
    chosen, setting = row(run.row), SETTINGS[run.setting]
    text = task.inputs.text(setting)
    model = task.inputs.load(setting, device)
    parameters = sum(p.numel() for p in model.parameters())
    torch.manual_seed(run.seed)
    defaults = {"budget": setting.budget, "max_grad_norm": 1.0, "seed": run.seed}
    learner = METHODS[chosen.method].make(model, defaults | dict(chosen.options))
    learned = learn(learner, text, Lesson(run.steps, setting.batch, run.lr, run.seed, device))
    plan = getattr(learner.evaluated, "plan", None)
    return {
        **asdict(learned),
        "data": text.digest,
        "parameters": parameters,
        "chunks": None if plan is None else len(plan.chunks),
        "total_s": time.perf_counter() - begin,
    }


def main() -> None:
    """Write one line, whatever happens; the whole error goes to stderr."""
    task = Task(**json.loads(sys.argv[1]))
    record = facts(task)
    try:
        record |= figures(task)
    except Exception as error:
        traceback.print_exc()
        record["failure"] = f"{type(error).__name__}: {error}"[:1000]
    results.append(Path(task.out), record)


if __name__ == "__main__":
    main()

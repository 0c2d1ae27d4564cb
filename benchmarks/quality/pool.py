"""Runs runs side by side, each in a process of its own, until nothing is left to run or no time is left to begin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from benchmarks.quality import results
from benchmarks.quality.results import Run
from benchmarks.quality.run import Task, facts

POLL_S = 0.2
COMMAND = (sys.executable, "-m", "benchmarks.quality.run")  # a `Task` as JSON follows


@dataclass
class _Child:
    run: Run
    process: subprocess.Popen[bytes]
    claim: int
    log: IO[bytes]
    begin: float


@dataclass(frozen=True)
class Pool:
    """``task.jobs`` runs at once, whose lines go where ``task`` says.

    None begins that would end after ``deadline``, a time of ``time.monotonic()``, if it took as long as the longest one
    so far, or ``longest`` seconds.
    """

    task: Task
    deadline: float
    longest: float
    command: Sequence[str] = COMMAND

    def work(self, left: Callable[[], list[Run]]) -> None:
        """Begin what ``left()`` names, which is asked again and again; wait for what other processes have begun."""
        children: list[_Child] = []
        longest, is_late = self.longest, False
        try:
            while True:
                for child in [c for c in children if c.process.poll() is not None]:
                    children.remove(child)
                    longest = max(longest, time.monotonic() - child.begin)
                    self._end(child, left)
                todo = left()
                is_late = is_late or time.monotonic() + longest > self.deadline
                running = {child.run for child in children}
                for run in () if is_late else todo:
                    if len(children) < self.task.jobs and run not in running:
                        children += self._begin(run, left)
                if not children and (is_late or not todo):
                    break
                time.sleep(POLL_S)
        finally:
            for child in children:
                child.process.kill()
                child.process.wait()
                child.log.close()
                os.close(child.claim)
        if todo:
            print(f"no time is left; still to be made: {todo[0]}, and {len(todo) - 1} others or more", flush=True)

    def _begin(self, run: Run, left: Callable[[], list[Run]]) -> list[_Child]:
        claim = results.claim(Path(self.task.work) / "claims", run)
        if claim is None:
            return []
        if run not in left():  # another process has finished it since it was looked for
            os.close(claim)
            return []
        log = open(self._log_of(run), "wb")  # noqa: SIM115
        cores = str(max((os.cpu_count() or 1) // self.task.jobs, 1))
        # sums of several threads differ with their number
        threads = {
            "OMP_NUM_THREADS": "1" if self.task.device == "cpu" else cores,
            "TORCHINDUCTOR_COMPILE_THREADS": cores,
        }
        task = json.dumps(asdict(replace(self.task, run=asdict(run))))
        process = subprocess.Popen(
            [*self.command, task],
            env=threads | dict(os.environ),
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[claim],
        )
        return [_Child(run, process, claim, log, time.monotonic())]

    def _end(self, child: _Child, left: Callable[[], list[Run]]) -> None:
        """Write why a run has no line, if it has none, give up its claim, and tell what came of it."""
        out, status = Path(self.task.out), child.process.returncode
        child.log.close()
        if child.run in left():
            failure = f"its process ended with status {status}; its output is in {self._log_of(child.run)}"
            results.append(out, facts(replace(self.task, run=asdict(child.run))) | {"failure": failure})
        os.close(child.claim)
        line = results.latest(results.read(out))[child.run]
        loss = "not finite" if line.get("loss") is None else f"{line['loss']:.4f}"
        took = time.monotonic() - child.begin
        print(f"{child.run}: {line['failure'] or loss} in {took:.0f} s", flush=True)

    def _log_of(self, run: Run) -> Path:
        logs = Path(self.task.work) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        return logs / f"{run.digest}.txt"

"""A command that runs rows of the learning benchmark whose runs train nothing: ``FOLDER JOBS MINUTES ROW...``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.quality.pool import Pool
from benchmarks.quality.results import Run, latest, read
from benchmarks.quality.run import Task
from benchmarks.quality.search import aim, runs_left

CHILD = (sys.executable, "-m", "tests.support.quality_child")


def pool(folder: Path, jobs: int, minutes: float, *rows: str) -> None:
    """All rates of the rows, as many as there is time for."""
    out = folder / "runs.jsonl"
    aims = [aim("cpu", row, 480, [1e-3, 3e-3], 1) for row in rows]

    def left() -> list[Run]:
        return runs_left(aims, latest(read(out)))

    task = Task({}, str(out), None, None, str(folder), "cpu", jobs, "abc")
    Pool(task, time.monotonic() + 60 * minutes, 0.0, CHILD).work(left)


if __name__ == "__main__":
    pool(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:])

"""A run of the learning benchmark that trains nothing: it tells in the file ``told`` that it began, and obeys its row.

``dense`` ends well; ``lomo`` is killed before it has written a line; ``lora`` writes that it failed; ``badam`` waits
until the file ``go`` is there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from benchmarks.quality.results import Record, Run, append


def main() -> None:
    task = json.loads(sys.argv[1])
    run, work = Run(**task["run"]), Path(task["work"])
    append(work / "told", {"run": str(run), "pid": os.getpid()})
    while run.row == "badam" and not (work / "go").exists():
        time.sleep(0.02)
    if run.row == "lomo":
        os.kill(os.getpid(), signal.SIGKILL)
    failure = "ValueError: no" if run.row == "lora" else ""
    record: Record = vars(run) | {"failure": failure, "loss": None if failure else 1 + run.lr}
    append(Path(task["out"]), record)


if __name__ == "__main__":
    main()

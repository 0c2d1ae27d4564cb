"""Which tests are slow: ``python -m tests.durations FILE`` writes tests/slow.txt from measured times.

    DURATIONS=times.txt .venv/bin/python -m pytest -n 2 -m "not slow or slow" -p tests.durations
    python -m tests.durations times.txt

As a plugin of pytest it appends a line a test, with its seconds, to the file that ``$DURATIONS`` names. Tests of more
than `LIMIT_S` seconds on an idle core get the mark ``slow`` (`tests.conftest`), but for those in `KEPT`, and for the
quickest one of a file that would have none left if it takes less than `QUICK_S`.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

LIMIT_S, QUICK_S = 1.5, 8.0
LIST = Path(__file__).with_name("slow.txt")
# What `make test` has to run whatever it takes: the promise that any order of a user's actions is right.
KEPT = ("tests/module/test_user_actions.py::test_any_order_of_actions",)


def pytest_runtest_logreport(report: Any) -> None:
    path = os.environ.get("DURATIONS")
    if path and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(path, "a") as file:
            file.write(f"{report.duration:.2f} {report.nodeid}\n")


def slow(times: dict[str, float]) -> list[str]:
    """The tests to mark, by their seconds."""
    by_file: dict[str, list[str]] = defaultdict(list)
    for name in times:
        by_file[name.split("::")[0]].append(name)
    chosen = []
    for names in by_file.values():
        above = [n for n in names if times[n] > LIMIT_S and n not in KEPT]
        quickest = min(names, key=lambda n: times[n])
        if len(above) == len(names) and times[quickest] < QUICK_S:
            above.remove(quickest)
        chosen += above
    return sorted(chosen)


def main() -> None:
    times: dict[str, float] = defaultdict(float)
    for line in Path(sys.argv[1]).read_text().splitlines():
        seconds, name = line.split(" ", 1)
        times[name] += float(seconds)
    LIST.write_text("".join(f"{name}\n" for name in slow(times)))


if __name__ == "__main__":
    main()

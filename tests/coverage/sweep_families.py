"""Every family in transformers' registry, tiny, against its plain model: ``python -m tests.coverage.sweep_families``.

Results are JSON lines, one a family and task, appended as they come: a run that was stopped goes on where it was.
Each family runs in a process of its own with a limit on time and memory. ``--table`` writes the results into
docs/coverage.md. See `tests.coverage.family_check` for what is compared, with ``--coverage all``
`tests.coverage.family_steps`; and `tests.coverage.family_configs` for how models become tiny.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import resource
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from tests.coverage import family_steps, family_table
from tests.coverage.family_check import FAULTS, PARTS, Result, as_record, check

TASKS = {
    "causal_lm": "CAUSAL_LM",
    "masked_lm": "MASKED_LM",
    "seq2seq_lm": "SEQ_TO_SEQ_CAUSAL_LM",
    "sequence_classification": "SEQUENCE_CLASSIFICATION",
    "image_classification": "IMAGE_CLASSIFICATION",
    "audio_classification": "AUDIO_CLASSIFICATION",
    "ctc": "CTC",
    "speech_seq2seq": "SPEECH_SEQ_2_SEQ",
    "image_text_to_text": "IMAGE_TEXT_TO_TEXT",
}
SECONDS = 180  # of processor time
MEMORY_BYTES = 6 << 30


def registry(task: str) -> dict[str, str]:
    """Model type to class name, as transformers lists them for a task."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    listed = getattr(auto, f"MODEL_FOR_{TASKS[task]}_MAPPING_NAMES")
    return {family: name if isinstance(name, str) else name[0] for family, name in listed.items()}


def entries(
    tasks: Sequence[str], families: Sequence[str] | None, shard: tuple[int, int], once: bool = False
) -> Iterator[tuple[str, str]]:
    """The (task, family) pairs of one shard of the registry; with ``once`` each family in its first task only."""
    chosen = [(t, f) for t in tasks for f in registry(t) if not families or f in families]
    if once:
        chosen = [(t, f) for f, t in {f: t for t, f in reversed(chosen)}.items()][::-1]
    index, count = shard
    yield from chosen[index::count]


# The result of a family in a task, given its class.
Check = Callable[[str, str, Any], Result]


def isolated(task: str, family: str, check: Check) -> dict[str, Any]:
    """The result of one family as plain data, from a process of its own."""
    name = registry(task)[family]
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _run_child(task, family, name, check, reading, writing)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text:
        record: dict[str, Any] = json.loads(text)
        return record
    cause = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
    return as_record(Result(task, family, name, "other exception", "process", f"its process ended with {cause}"))


def _run_child(task: str, family: str, name: str, check: Check, reading: int, writing: int) -> None:
    """Check one family and never return."""
    os.close(reading)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    warnings.simplefilter("ignore")
    transformers = importlib.import_module("transformers")
    try:
        record = as_record(check(task, family, getattr(transformers, name)))
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(record))
    finally:
        os._exit(0)


def known(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The latest result of each family in a file of results."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    return {(r["task"], r["family"]): r for r in records}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the status is 1 if there is a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.coverage.sweep_families", description=__doc__)
    parser.add_argument("families", nargs="*", help="model types; all of the registry without any")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated, of: " + ", ".join(TASKS))
    parser.add_argument("--shard", default="0/1", help="i/n runs every n-th family from the i-th on")
    parser.add_argument("--results", type=Path, default=Path("families.jsonl"), help="JSON lines, appended to")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, of: " + ", ".join(PARTS))
    parser.add_argument("--coverage", choices=family_table.TITLES, default="one", help="what a step trains")
    parser.add_argument("--once", action="store_true", help="each family in the first of the tasks that list it only")
    parser.add_argument("--again", default="", help="comma-separated outcomes whose families run again")
    parser.add_argument("--table", action="store_true", help="write the results so far into docs/coverage.md")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.table:
        family_table.write(list(known(given.results).values()), Path("docs/coverage.md"), given.coverage)
        return 0
    index, count = (int(part) for part in given.shard.split("/"))
    importlib.import_module("transformers.models.llama.modeling_llama")  # what all families import, once
    before = known(given.results)
    again = given.again.split(",")
    parts = tuple(given.parts.split(","))
    held: Check = family_steps.check if given.coverage == "all" else functools.partial(check, parts=parts)
    counts: Counter[str] = Counter()
    for task, family in entries(given.tasks.split(","), given.families, (index, count), given.once):
        if (task, family) in before and before[task, family]["outcome"] not in again:
            counts[before[task, family]["outcome"]] += 1
            continue
        record = isolated(task, family, held)
        counts[record["outcome"]] += 1
        with given.results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        told = (f"{task}/{family}", record["outcome"], record["where"], record["detail"], f"{record['seconds']}s")
        sys.stdout.write("  ".join(told) + "\n")
        sys.stdout.flush()
    sys.stdout.write(", ".join(f"{n} {outcome}" for outcome, n in counts.most_common()) + "\n")
    return int(any(counts[f] for f in FAULTS))


if __name__ == "__main__":
    sys.exit(main())

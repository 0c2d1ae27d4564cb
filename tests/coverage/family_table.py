"""The results of a sweep over transformers families as a section of docs/coverage.md."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The sections, by what a step trains.
TITLES = {"one": "transformers families", "all": "transformers families with full coverage"}


def write(records: Sequence[dict[str, Any]], path: Path, coverage: str) -> None:
    """Replace the section between its markers, or append it; the rest of the file stays."""
    title = TITLES[coverage]
    begin, end = f"<!-- begin: {title} -->", f"<!-- end: {title} -->"
    text = path.read_text() if path.exists() else "# What was tried\n"
    built = [r for r in records if r["outcome"] != "not built"]
    head = _of_steps(built) if coverage == "all" else _of_chunks(built)
    section = "\n".join([begin, f"## {title}", "", *head, "", *_tables(records), end, ""])
    if begin in text:
        before, rest = text.split(begin, 1)
        text = before + section + "\n" + rest.split(end, 1)[1].lstrip("\n")
    else:
        text = text.rstrip("\n") + "\n\n" + section
    path.write_text(text.rstrip("\n") + "\n")


def _of_chunks(built: Sequence[dict[str, Any]]) -> list[str]:
    return [
        "Each family in the registry of transformers, with a tiny configuration made by rules from its own one and",
        "random weights in float32: gradients of three chunks, a batch of another shape, dropout under a seed and",
        "evaluation, against the plain model. Made by `python -m tests.coverage.sweep_families`, here by `--table`.",
        "",
        f"{len({r['family'] for r in built})} families were built and compared, {_in_all_parts(built)} of them",
        "in all parts of the check, the others in the gradients of one batch shape without dropout.",
    ]


def _of_steps(built: Sequence[dict[str, Any]]) -> list[str]:
    largest = max((r["largest_error"] for r in built if r["outcome"] == "right"), default=0.0)
    return [
        "The same tiny models in float64, all parameters in every step: after ten steps their parameters and buffers",
        "are those of `torch.optim.AdamW` on the plain model, to 1e-9 of each value (absolute below 1). Each family is",
        'trained with `update="step"` and with `update="backward"`, in loops that are drawn by its name: one or two',
        "backward passes a step, clipping, a group without decay, a frozen parameter, some or all weights in host",
        "memory. Made by `python -m tests.coverage.sweep_families --coverage all`, here by `--table`.",
        "",
        f"{len(built)} families were built; the largest difference in those that are right is {largest:.0e}.",
        "*Differs, as the plain model from itself*: a key's bias, whose gradient is zero but for rounding, in a model",
        "that computes in float32 within; the plain model, its weights moved by 1e-13, gets as far from itself.",
    ]


def _tables(records: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| task | " + " | ".join(_outcomes(records)) + " |",
        "| --- |" + " --- |" * len(_outcomes(records)),
    ]
    by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for r in records:
        by_task[r["task"]].append(r)
    for task, found in by_task.items():
        counts = Counter(r["outcome"] for r in found)
        lines.append(f"| {task} | " + " | ".join(str(counts[o]) for o in _outcomes(records)) + " |")
    for task, found in by_task.items():
        right = sorted(r["family"] for r in found if r["outcome"] == "right")
        lines += ["", f"### {task}", "", f"Right ({len(right)}): {', '.join(right)}."]
        other = sorted((r for r in found if r["outcome"] != "right"), key=lambda r: (r["outcome"], r["family"]))
        if other:
            lines += ["", "| family | outcome | where | why |", "| --- | --- | --- | --- |"]
            lines += [f"| {r['family']} | {r['outcome']} | {r['where']} | {_cell(r['detail'])} |" for r in other]
    return lines


def _in_all_parts(records: Sequence[dict[str, Any]]) -> int:
    most = max(len(r["parts"]) for r in records)
    return len({r["family"] for r in records if len(r["parts"]) == most})


def _outcomes(records: Sequence[dict[str, Any]]) -> list[str]:
    return [outcome for outcome, _ in Counter(r["outcome"] for r in records).most_common()]


def _cell(text: str) -> str:
    """Text that a table takes, without the paths of one machine."""
    short = re.sub(r"/\S*/site-packages/", "", text).replace("|", "\\|").replace("<", "&lt;")
    return short[:160]

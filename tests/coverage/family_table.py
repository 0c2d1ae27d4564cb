"""The results of a sweep over transformers families as a section of docs/coverage.md."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- begin: transformers families -->", "<!-- end: transformers families -->"


def write(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Replace the section between the markers, or append it; the rest of the file stays."""
    text = path.read_text() if path.exists() else "# What was tried\n"
    section = f"{BEGIN}\n{_section(records)}\n{END}\n"
    if BEGIN in text:
        before, rest = text.split(BEGIN, 1)
        text = before + section + rest.split(END, 1)[1].lstrip("\n")
    else:
        text = text.rstrip("\n") + "\n\n" + section
    path.write_text(text)


def _section(records: Sequence[dict[str, Any]]) -> str:
    built = [r for r in records if r["outcome"] != "not built"]
    lines = [
        "## transformers families",
        "",
        "Each family in the registry of transformers, with a tiny configuration made by rules from its own one and",
        "random weights in float32: gradients of three chunks, a batch of another shape, dropout under a seed and",
        "evaluation, against the plain model. Made by `python -m tests.coverage.sweep_families`, here by `--table`.",
        "",
        f"{len({r['family'] for r in built})} families were built and compared, {_in_all_parts(built)} of them",
        "in all parts of the check, the others in the gradients of one batch shape without dropout.",
        "",
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
    return "\n".join(lines)


def _in_all_parts(records: Sequence[dict[str, Any]]) -> int:
    most = max(len(r["parts"]) for r in records)
    return len({r["family"] for r in records if len(r["parts"]) == most})


def _outcomes(records: Sequence[dict[str, Any]]) -> list[str]:
    return [outcome for outcome, _ in Counter(r["outcome"] for r in records).most_common()]


def _cell(text: str) -> str:
    """Text that a table takes, without the paths of one machine."""
    short = text.replace("|", "\\|").replace("<", "&lt;")
    return short[:160]

"""The first line of each file says what the file does: with a verb, or in the form of its kind (pass, command)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p.relative_to(ROOT) for room in ("chunkft_fx", "passes", "tools") for p in (ROOT / room).rglob("*.py"))
# Deciding, predicting, writing, running and copying, and the words for it that say more in some place.
VERBS = {
    "Checks", "Computes", "Copies", "Cuts", "Decides", "Defines", "Describes", "Finds", "Gathers", "Gives", "Holds",
    "Installs", "Keeps", "Loads", "Lowers", "Makes", "Measures", "Predicts", "Prepares", "Reads", "Rewrites", "Runs",
    "Says", "Takes", "Writes",
}  # fmt: skip


def first_line(text: str) -> str:
    """The first line of a file's docstring, empty without one."""
    return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]


def fault(path: Path, text: str) -> str | None:
    """What is wrong with a file's first line; None if nothing is."""
    line = first_line(text)
    if not line.endswith("."):
        return "the first line of its docstring is no whole sentence"
    if path.name == "__init__.py":
        return None  # a room is described by what is in it
    if path.parts[:2] in (("passes", "region"), ("passes", "program")):
        return None if line.startswith(f"{path.stem}: ") else "a pass begins with its name"
    if line.startswith("``chunkft "):
        return None if line.startswith(f"``chunkft {path.stem}``: ") else "a command begins with its name"
    words = [line.split(" ")[0], re.sub(r"^[A-Z][\w ]*: ", "", line).split(" ")[0].capitalize()]
    return None if VERBS & set(words) else f"{words[0]!r} is no verb that says what the file does"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_first_line_says_what_the_file_does(path: Path) -> None:
    assert fault(path, (ROOT / path).read_text()) is None


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("chunkft_fx/plan/x.py", ""),
        ("chunkft_fx/plan/x.py", '"""Decides what"""'),
        ("chunkft_fx/plan/x.py", '"""Helpers for plans."""'),
        ("chunkft_fx/plan/x.py", '"""Ring: a few buffers."""'),
        ("passes/region/x.py", '"""Rewrites a graph."""'),
        ("tools/x.py", '"""``chunkft y``: show."""'),
    ],
)
def test_a_first_line_that_says_nothing_is_found(path: str, text: str) -> None:
    assert fault(Path(path), text) is not None

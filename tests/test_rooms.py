"""The house: imports only run down from room to room, files import each other in no circle, and rooms stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
# From the top down: each room may import from those behind it, and every room from the files beside the rooms.
ROOMS = (
    "tools", "trainers", "checkpoints", "optim", "module", "following", "runtime", "planning", "predict", "program",
    "passes",
    "splitting", "capture", "machine", "copies", "head", "gradients", "kernels", "ranks", "plan", "graph",
)  # fmt: skip
GROUND = ("errors", "bytes", "logs", "torch_internals", "torch_sizes")
MOST_FILES = 9


def sources() -> Iterator[tuple[str, Path]]:
    """Each file of the package with its dotted name behind ``chunkft_fx.``; passes and tools are links."""
    for folder in (ROOT / "chunkft_fx", ROOT / "passes", ROOT / "tools"):
        base = folder if folder.name == "chunkft_fx" else ROOT
        for path in sorted(folder.glob("**/*.py")):
            name = ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
            yield ("" if name == "__init__" else name), path


FILES = dict(sources())


def imports(path: Path) -> Iterator[str]:
    """The files that a file imports, also for types only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "chunkft_fx":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".removeprefix("chunkft_fx.")
                yield inner if inner in FILES else (node.module or "").removeprefix("chunkft_fx").removeprefix(".")


def level(name: str) -> int:
    """The place of a file's room, from the top; files of one room may import each other."""
    room = name.split(".")[0]
    if room in ROOMS:
        return ROOMS.index(room)
    return len(ROOMS) if room in GROUND else ["", "api"].index(name) - 2


@pytest.mark.parametrize("name", FILES)
def test_imports_only_run_down(name: str) -> None:
    for other in imports(FILES[name]):
        assert level(other) >= level(name), f"{name} imports {other}"


def test_files_import_each_other_in_no_circle() -> None:
    edges = [(name, other) for name, path in FILES.items() for other in imports(path)]
    circles = [c for c in nx.strongly_connected_components(nx.DiGraph(edges)) if len(c) > 1]
    assert not circles


def test_no_folder_has_more_files_than_one_can_look_over() -> None:
    folders: dict[Path, int] = {}
    for path in FILES.values():
        folders[path.parent] = folders.get(path.parent, 0) + 1
    assert {f: n for f, n in folders.items() if n > MOST_FILES} == {}


def test_every_room_is_known() -> None:
    rooms = {name.split(".")[0] for name in FILES}
    assert rooms - {"", "api", "__init__"} == {*ROOMS, *GROUND}

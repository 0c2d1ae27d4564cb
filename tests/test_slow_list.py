"""The list of slow tests names tests that there are, so that renaming one does not hide it for good."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.conftest import SLOW
from tests.durations import slow

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", sorted({name.split("[")[0] for name in SLOW}))
def test_each_listed_test_is_there(name: str) -> None:
    path, *classes, function = name.split("::")
    if not classes:
        assert f"def {function}(" in (ROOT / path).read_text()
        return
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    assert callable(getattr(getattr(module, classes[0]), function))  # of a class that may have it from another file


def test_a_file_keeps_its_quickest_test() -> None:
    times = {"a.py::x": 9.0, "a.py::y": 4.0, "b.py::x": 20.0, "c.py::x": 0.1, "c.py::y": 30.0}
    assert slow(times) == ["a.py::x", "b.py::x", "c.py::y"]

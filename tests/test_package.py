"""What is built from the source: the wheel holds all rooms and ``py.typed``, also one of the source distribution."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import chunkft_fx

ROOT = Path(chunkft_fx.__file__).parents[1]
SOURCE = ("chunkft_fx", "passes", "tools", "pyproject.toml", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source, links as links; a build leaves folders behind in it."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCE:
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, folder)
        else:
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def build(kind: str, source: Path, into: Path) -> Path:
    into.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(into)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = into.iterdir()
    return built


def packed(wheel: Path) -> dict[str, bytes]:
    """The package's files in a wheel, by name."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


def written(source: Path) -> dict[str, bytes]:
    """The package's files in the source, by name, links followed."""
    package = source / "chunkft_fx"
    folders = [package, package / "passes", package / "tools"]
    files = [p for folder in folders for p in folder.rglob("*") if p.suffix == ".py" or p.name == "py.typed"]
    return {str(p.relative_to(source)): p.read_bytes() for p in files}


def test_a_wheel_and_one_of_the_source_distribution_hold_the_whole_package(source: Path, tmp_path: Path) -> None:
    files = written(source)
    assert {"chunkft_fx/py.typed", "chunkft_fx/passes/__init__.py", "chunkft_fx/tools/training/train.py"} <= set(files)
    assert packed(build("wheel", source, tmp_path / "wheel")) == files
    with tarfile.open(build("sdist", source, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = build("wheel", unpacked, tmp_path / "again")
    assert packed(wheel) == files
    assert wheel.name.startswith(f"chunkft_fx-{chunkft_fx.__version__}-")


def test_an_installed_wheel_is_imported_from_where_it_lies(source: Path, tmp_path: Path) -> None:
    """Far from the source, of which the folders ``passes`` and ``tools`` are linked into the package."""
    with zipfile.ZipFile(build("wheel", source, tmp_path / "wheel")) as archive:
        archive.extractall(tmp_path / "installed")
    program = (
        "import chunkft_fx, chunkft_fx.passes, chunkft_fx.tools.cli, importlib.metadata as m; "
        "print(chunkft_fx.__file__, chunkft_fx.passes.__file__, chunkft_fx.__version__ == m.version('chunkft-fx'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=False,
    )
    package = tmp_path / "installed" / "chunkft_fx"
    assert done.stdout.split() == [str(package / "__init__.py"), str(package / "passes" / "__init__.py"), "True"], done

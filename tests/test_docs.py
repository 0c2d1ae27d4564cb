"""The pages of docs/ that say what the source has: the API, environment variables, loggers, errors."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import chunkft_fx
from chunkft_fx.errors import ChunkFTError, ChunkFTWarning
from chunkft_fx.tools.zoo import tiny
from docs import api_page

ROOT = Path(api_page.__file__).parents[1]
PACKAGE = ROOT / "chunkft_fx"


def rows(page: str) -> list[list[str]]:
    """The cells of all rows of a page's tables, without heads and rules."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    return [row for row in cells if row[0].startswith("`")]


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Every file of the package by its path in it, links followed."""
    folders = [PACKAGE, PACKAGE / "passes", PACKAGE / "tools"]
    for path in sorted({p for folder in folders for p in folder.rglob("*.py")}):
        yield str(path.relative_to(PACKAGE)), ast.parse(path.read_text())


def variables() -> dict[str, set[str]]:
    """The environment variables of this library, and the files that name each as a whole string."""
    found: dict[str, set[str]] = {}
    for file, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and re.fullmatch(r"CHUNKFT_[A-Z_]+", str(node.value)):
                found.setdefault(str(node.value), set()).add(file)
    return found


def test_the_api_page_is_up_to_date() -> None:
    assert api_page.PAGE.read_text() == api_page.page(), "run: make docs"


def test_every_public_name_has_its_place_on_the_api_page() -> None:
    text = api_page.page()
    assert all(f"## {name}\n" in text for name in ("chunkft_fx.compile", "chunkft_fx.AdamW", "CompiledModule"))
    assert all(f"**`{name}`**" in text for name in api_page.error_classes())
    assert "``" not in text.replace("```", "")


def test_every_environment_variable_is_on_the_page_with_the_file_that_reads_it() -> None:
    documented = {row[0].strip("`"): {row[3].strip(" |`")} for row in rows("environment.md") if "CHUNKFT_" in row[0]}
    assert documented == variables()
    assert all(len(row[1]) > 20 and row[2] for row in rows("environment.md") if "CHUNKFT_" in row[0])


def test_every_room_that_logs_is_on_the_page() -> None:
    names = [
        node.args[0].value
        for _, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "getLogger"
        if isinstance(node.args[0], ast.Constant)
    ]
    rooms = {name.split(".")[1] for name in map(str, names) if name.startswith("chunkft_fx.")}
    text = (ROOT / "docs" / "environment.md").read_text()
    listed = text.split("| logger |")[1].split("## Of torch")[0]
    assert rooms == set(re.findall(r"^\| `(\w+)` \|", listed, re.MULTILINE))


def test_every_error_has_its_entry_in_troubleshooting() -> None:
    entries = rows("troubleshooting.md")
    ours = [row for row in entries if not row[0].startswith("`torch.")]
    assert sorted(row[0].strip("`") for row in ours) == sorted(api_page.error_classes())
    assert all(issubclass(c, (ChunkFTError, ChunkFTWarning)) for c in api_page.error_classes().values())
    assert all(len(row) == 3 and all(len(cell) > 20 for cell in row[1:]) for row in entries)


def test_links_between_pages_lead_to_files() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_files_and_modules_that_pages_name_exist() -> None:
    """Paths from the root or the package, or a file's name alone; modules as ``python -m`` has them."""
    folders = [ROOT / name for name in ("chunkft_fx", "passes", "tools", "tests", "benchmarks", "docs")]
    files = {f"/{p.relative_to(ROOT)}" for folder in folders for p in folder.rglob("*.py")}
    files |= {f"/chunkft_fx{file}" for file in files}
    modules = {file[1:].removesuffix(".py").replace("/", ".") for file in files}
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text()
        for path in re.findall(r"`([\w/]+\.py)`", text):
            assert any(file.endswith(f"/{path}") for file in files), f"{page.name} names {path}"
        for module in re.findall(r"-m ((?:chunkft_fx|benchmarks|tests|docs)[\w.]+)", text):
            assert module in modules, f"{page.name} names {module}"


def test_the_first_example_of_the_readme_trains_all_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, with a small model in the place of the one that it loads, and on the CPU."""
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    tiny_model, batch = tiny("llama", torch.bfloat16)
    before = {n: p.detach().clone() for n, p in tiny_model.named_parameters()}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: tiny_model)
    monkeypatch.setattr(type(tiny_model), "cuda", lambda self: self)
    compiling = functools.partial(chunkft_fx.compile, backend="eager")
    monkeypatch.setattr(chunkft_fx, "compile", compiling)
    exec(code, {"loader": [batch(2, 12, 0)]})
    assert all(not torch.equal(p, before[n]) for n, p in tiny_model.named_parameters() if "norm" not in n)
    assert (tmp_path / "out" / "model.safetensors").exists()

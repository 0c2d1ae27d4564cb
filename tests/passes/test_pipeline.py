"""The runner: it times, logs, verifies and reports any sequence of passes, and knows none of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch.nn import functional

from chunkft_fx import passes
from chunkft_fx.errors import VerificationError
from chunkft_fx.graph.region import RegionGraph
from chunkft_fx.program.run_passes import over_region
from tests.passes.joint import demands, joint


@dataclass(frozen=True)
class Relabel:
    """Replaces ``tanh`` by ``sin``, and counts what it is told to count."""

    rewrites: int
    name: str = "relabel"
    numerics: Literal["bitwise", "reassociated"] = "bitwise"

    def __call__(self, region: RegionGraph) -> int:
        for node in region.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default):
            node.target = torch.ops.aten.sin.default
        return self.rewrites


@dataclass(frozen=True)
class Break:
    """Removes what a node is recorded to be."""

    name: str = "break"
    numerics: Literal["bitwise", "reassociated"] = "bitwise"

    def __call__(self, region: RegionGraph) -> int:
        next(n for n in region.graph.nodes if n.op == "call_function").meta.clear()
        return 1


def _region() -> RegionGraph:
    case = joint(lambda w, x: functional.linear(x, w).tanh(), [torch.randn(7, 5)], [torch.randn(4, 5)])
    return case.region.copy()


def test_rewrites_are_summed_by_pass_name() -> None:
    steps = (Relabel(2), Relabel(3), Relabel(5, name="other"))
    assert over_region(_region(), steps) == {"relabel": 5, "other": 5}


def test_hook_sees_every_pass_in_order() -> None:
    seen: list[tuple[str, int]] = []
    region = _region()

    def hook(name: str, graph: RegionGraph, rewrites: int, seconds: float) -> None:
        assert graph is region
        assert seconds >= 0
        seen.append((name, rewrites))

    over_region(region, (Relabel(1), Relabel(4, name="other")), hook)
    assert seen == [("relabel", 1), ("other", 4)]


def test_module_runs_the_rewritten_graph() -> None:
    case = joint(lambda w, x: functional.linear(x, w).tanh(), [torch.randn(7, 5)], [torch.randn(4, 5)])
    region = case.region.copy()
    over_region(region, [Relabel(1)])
    weight, x = case.primals
    assert torch.equal(case.run(region)[0], functional.linear(x, weight).sin())


def test_passes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "chunkft_fx.passes"):
        over_region(_region(), [Relabel(3)])
    assert [r.getMessage().split(" in ")[0] for r in caplog.records if r.name == "chunkft_fx.passes"] == [
        "relabel: 3 rewrites"
    ]


def test_verification_is_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VerificationError, match="after break: "):
        over_region(_region(), [Break()])
    monkeypatch.delenv("CHUNKFT_VERIFY")
    assert over_region(_region(), [Break()]) == {"break": 1}


def test_default_pipeline_is_an_explicit_tuple() -> None:
    demand = demands([(0, 1, 2)])
    names = [step.name for step in passes.default_pipeline(demand)]
    sliced = ["canonicalize", "select_slices", "eliminate", "sink_slices", "eliminate"]
    assert names == [*sliced, "chunk_logits", "split_head"]


def test_counts_of_the_default_pipeline() -> None:
    counts = over_region(_region(), passes.default_pipeline(demands([(0, 1, 2)])))
    assert set(counts) == {"canonicalize", "select_slices", "eliminate", "sink_slices", "chunk_logits", "split_head"}
    assert counts["select_slices"] == 1
    assert counts["canonicalize"] > 0
    assert counts["sink_slices"] > 0


def test_package_has_one_name() -> None:
    """A second copy under another name would register rules that the first does not know."""
    with pytest.raises(ImportError, match=r"chunkft_fx\.passes"):
        __import__("passes")


def test_every_pass_is_described_and_has_its_contract() -> None:
    """``passes/README.md`` has a row for each pass, and ``docs/passes.md`` a row and a section."""
    kinds = [kind for name, kind in vars(passes).items() if name in passes.__all__ and isinstance(kind, type)]
    names = [next(field.default for field in fields(kind) if field.name == "name") for kind in kinds]
    assert len(names) == 15
    contracts, described = (Path(p).read_text() for p in ("passes/README.md", "docs/passes.md"))
    for name in names:
        assert f"\n| `{name}` |" in contracts
        assert f"\n| [{name}](#{name}) |" in described
        assert f"# {name}\n" in described

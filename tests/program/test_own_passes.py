"""Passes of a user's own run behind the library's, over region graphs and programs, through the same runner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, fx, nn

import chunkft_fx
from chunkft_fx.errors import OptionError, VerificationError
from chunkft_fx.graph.region import RegionGraph
from chunkft_fx.tools.inspect import print_program_passes, summary
from tests.support.forced_streaming import streaming


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(layer(x))
        return x.square().mean()


@dataclass(frozen=True)
class SinToCos:
    """A rewrite that changes values, so that one sees whether it ran."""

    name: str = "sin_to_cos"
    numerics: Literal["bitwise", "reassociated"] = "bitwise"

    def __call__(self, region: RegionGraph) -> int:
        found = region.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
        for node in found:
            node.target = torch.ops.aten.cos.default
        return len(found)


@dataclass(frozen=True)
class Seen:
    """Looks at programs: whether stream nodes are there already, and how many calls each has."""

    name: str = "seen"
    calls: list[int] = field(default_factory=list, compare=False)
    fetches: list[int] = field(default_factory=list, compare=False)

    def __call__(self, module: fx.GraphModule) -> int:
        self.calls.append(len(module.graph.find_nodes(op="call_module")))
        self.fetches.append(sum("fetch" in str(n.target) for n in module.graph.nodes))
        return 0


def compiled(model: nn.Module, **options: Any) -> Any:
    return chunkft_fx.compile(model, "1GB", chunks=2, backend="eager", **options)


def test_a_region_pass_rewrites_what_runs() -> None:
    model, x = Net(), torch.randn(2, 5)
    changed = compiled(model, region_passes=[SinToCos()])
    loss = changed(x)
    expected = x
    for layer in model.layers:
        expected = torch.cos(layer(expected))
    torch.testing.assert_close(loss, expected.square().mean())
    assert any(v.counts.get("sin_to_cos") for v in changed.variants)


def test_a_program_pass_sees_the_stream_nodes_and_is_shown_by_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    seen = Seen()
    with streaming("all"):
        changed = compiled(Net(), program_passes=[seen])
        changed(torch.randn(2, 5)).backward()
    assert max(seen.calls) > 0
    assert seen.fetches[-1] > 0
    assert summary(changed)[0].startswith("program: insert_streams")
    print_program_passes(changed)
    printed = capsys.readouterr().out
    places = [printed.index(f"== {name}:") for name in ("offload_saved", "insert_streams", "schedule_prefetch", "seen")]
    assert places == sorted(places)


@dataclass(frozen=True)
class Breaks:
    name: str = "breaks"

    def __call__(self, module: fx.GraphModule) -> int:
        waits = [n for n in module.graph.nodes if str(n.target) == "chunkft_fx.wait.default"]
        for node in waits[:1]:
            module.graph.erase_node(node)
        return len(waits[:1])


def test_a_program_that_a_pass_broke_does_not_run() -> None:
    with pytest.raises(VerificationError), streaming("all"):
        compiled(Net(), program_passes=[Breaks()])(torch.randn(2, 5)).backward()


@pytest.mark.parametrize("option", ["region_passes", "program_passes"])
@pytest.mark.parametrize("wrong", [3, lambda graph: 0])
def test_what_is_no_pass_is_refused(option: str, wrong: Any) -> None:
    with pytest.raises(OptionError, match=f"{option} has .* no pass"):
        compiled(Net(), **{option: [wrong]})

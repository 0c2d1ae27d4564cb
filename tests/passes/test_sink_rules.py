"""The table of sinking rules: what enters it, and what becomes of a rule that refuses or is wrong."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from chunkft_fx.passes import sink_rules
from chunkft_fx.passes.sink_rules import RULES, Cut, Refused, Rule, rule
from tests.passes.joint import check, joint, refused

aten = torch.ops.aten
TESTS = Path(__file__).parent


def _reasons() -> list[tuple[str, str]]:
    """Every reason that a rule refuses with, and the file of the rule."""
    (folder,) = sink_rules.__path__
    calls = (
        (node, path.name)
        for path in sorted(Path(folder).glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Refused"
    )
    return [(ast.literal_eval(node.args[0]), name) for node, name in calls]


def test_every_reason_is_reached_by_a_test() -> None:
    """A reason stands as one string in a rule, and is compared as one string in a test of the same folder."""
    compared = {
        node.value
        for path in TESTS.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    reasons = _reasons()
    assert len(reasons) > 20
    assert [f"{name}: {reason}" for reason, name in reasons if reason not in compared] == []


def test_every_file_of_the_folder_is_imported() -> None:
    """A new file needs no entry anywhere else."""
    (folder,) = sink_rules.__path__
    files = {path.stem for path in Path(folder).glob("*.py")} - {"__init__", "table", "elementwise"}
    entered = {entry.function.__module__.rpartition(".")[2] for entry in RULES.values()}
    assert files <= entered


def test_refuses_to_register_what_is_no_operator_overload() -> None:
    with pytest.raises(TypeError, match="no operator overload"):
        rule(aten.roll)(_wrong_size)
    with pytest.raises(TypeError, match="no operator overload"):
        rule(torch.roll)(_wrong_size)


def test_refuses_a_second_rule_for_an_operator() -> None:
    with pytest.raises(ValueError, match="has a rule already: permute"):
        rule(aten.permute.default)(_wrong_size)


def _wrong_size(cut: Cut, node: fx.Node) -> fx.Node:
    """A defect: two indices more than were asked for."""
    x: Any = node.args[0]
    return cut.emit(aten.neg.default, cut.take(x, cut.dim, length=cut.length + 2), like=node)


def _wrong_dtype(cut: Cut, node: fx.Node) -> fx.Node:
    x: Any = node.args[0]
    return cut.emit(aten._to_copy.default, cut.take(x, cut.dim), like=node, dtype=torch.float64)


@pytest.mark.parametrize("function", [_wrong_size, _wrong_dtype])
def test_refuses_a_replacement_of_another_shape_or_dtype(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, aten.roll.default, Rule(function, contracts=False))
    report = refused(0, aten.roll.default, torch.randn(5, 7), [1], [1])
    assert report.reason == "the rule made a value of another shape or dtype, which is a defect of the rule"


def test_a_refusal_takes_away_what_the_rule_wrote_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """`refused` compares the graph before and after."""

    def late(cut: Cut, node: fx.Node) -> fx.Node:
        x: Any = node.args[0]
        cut.emit(aten.add.Tensor, cut.take(x, cut.dim), cut.emit(aten.neg.default, x, like=node), like=node)
        raise Refused("too late", node)

    monkeypatch.setitem(RULES, aten.roll.default, Rule(late, contracts=False))
    report = refused(0, aten.roll.default, torch.randn(5, 7), [1], [1])
    assert (report.reason, report.node, report.nbytes) == ("too late", "roll_default", 5 * 7 * 4)


def test_refuses_an_operator_without_a_rule() -> None:
    """Of an inverse each element depends on the whole matrix, so that no rule can ever be."""
    report = refused(0, aten.linalg_inv_ex.default, torch.randn(5, 5), result=0)
    assert (report.node, report.reason) == ("linalg_inv_ex_default", "no rule is known for this operator")
    assert refused(0, aten.linalg_matrix_exp.default, torch.randn(5, 5)).reason == "no rule is known for this operator"


def test_an_own_rule_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(5, 7, dtype=torch.float64), torch.randn(13, 5, 7, dtype=torch.float64)
    monkeypatch.delitem(RULES, aten.cumsum.default, raising=False)
    case = joint(lambda w, x: w.cumsum(1) * x, [weight], [x])
    assert [d.op for d in check(case, (0, 1, 2)).dense] == ["aten.cumsum.default"]

    def cumsum(cut: Cut, node: fx.Node) -> fx.Node:
        operand: Any = node.args[0]
        dim: Any = node.args[1]
        if dim == cut.dim:
            raise Refused("the operator sums along the cut dimension", node)
        return cut.emit(aten.cumsum.default, cut.take(operand, cut.dim), dim, like=node)

    monkeypatch.setitem(RULES, aten.cumsum.default, Rule(cumsum, contracts=False))
    assert check(case, (0, 1, 2)).dense == []


def test_the_worked_example_of_contributing_is_in_the_code() -> None:
    """The rule and its tests stand there as they stand here, and the script runs."""
    page = Path("CONTRIBUTING.md").read_text()
    script, function, sinks, refusal = map(textwrap.dedent, re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    assert function in Path("passes/sink_rules/layout.py").read_text()
    tests = Path("tests/passes/test_sink_layout.py").read_text()
    assert textwrap.indent(sinks, "    ") in tests
    assert textwrap.indent(refusal, "    ") in tests
    found: dict[str, Any] = {}
    exec(script, found)
    assert found["region"].dense == []

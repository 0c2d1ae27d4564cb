"""Kept plans: an equal question gets an equal plan without a search, any other question gets its own."""

from __future__ import annotations

import copy
import functools
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import nn

import chunkft_fx
from chunkft_fx.copies import host_memory
from chunkft_fx.errors import BudgetInfeasible
from chunkft_fx.graph.region import RegionGraph
from chunkft_fx.graph.sizes import Sizes
from chunkft_fx.machine.rates import Rates
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.plan.cuts import cut
from chunkft_fx.plan.pieces import DEPTH
from chunkft_fx.plan.plan import VERSION, Plan
from chunkft_fx.plan.state_spec import ASSUMED, StateSpec, StateTensor
from chunkft_fx.planning import kept_plans
from chunkft_fx.planning.coverage import ring
from chunkft_fx.planning.kept_plans import FOLDER, digest
from chunkft_fx.planning.planner import Options, parameter_specs, plan_for_batch
from chunkft_fx.predict.predictor import Predictor
from tests.support.changing_batches import Text, compiled, smallest, text

RATES = Rates({"float32": 5e13, "bfloat16": 6e14}, 4e12, 5e10, 5e10, 4e10, 7.0)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Plan]:
    """The plans that were searched for; the cache is a folder of the test's own."""
    question()  # whose own plan is no part of the test
    made: list[Plan] = []
    search = plan_for_batch

    def counted(*arguments: Any) -> Plan:
        made.append(search(*arguments))
        return made[-1]

    monkeypatch.delenv("CHUNKFT_VERIFY")
    monkeypatch.setenv("CHUNKFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_plans, "plan_for_batch", counted)
    return made


def files() -> list[Path]:
    return sorted(FOLDER.path("").glob("*"))


def trained(budget: int | str = "1GB", **options: Any) -> CompiledModule:
    torch.manual_seed(0)
    module = compiled(Text(), budget, **options)
    module(**text(2, 8)).backward()
    return module


@functools.cache
def question() -> tuple[nn.Module, Options, CompiledModule]:
    module = compiled(Text(), "1GB", chunks=3)
    module(**text(2, 8))
    return module._training.model, module._training.options, module


def predictor(**of_a_batch: Any) -> Predictor:
    (session,) = question()[2]._training.sessions
    return Predictor(session.programs, **of_a_batch)


def planned() -> Plan:
    """The plan for the question, kept or made."""
    model, options, _ = question()
    return kept_plans.known_or_made(model, options, None, predictor(), "a batch", ASSUMED)


@pytest.mark.parametrize("options", [{}, {"chunks": 3}, {"coverage": "all"}])
def test_an_equal_question_gets_the_same_plan_without_a_search(searches: list[Plan], options: dict[str, Any]) -> None:
    first, second = trained(**options), trained(**options)
    assert len(searches) == 1
    assert second.plan == first.plan
    assert second.plan.explain() == first.plan.explain()
    gradients = [[s.grad for s in module.active_slices()] for module in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None)


def test_plans_of_both_coverages_are_kept_and_the_choice_between_them_is_not(
    searches: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained(coverage="auto")
    assert len(searches) == 2
    assert first.plan.coverage == "all"
    monkeypatch.setattr(host_memory, "available_nbytes", lambda: 1000)
    second = trained(coverage="auto")
    assert len(searches) == 2
    assert second.plan.coverage == "one"


def test_a_plan_with_a_deep_ring_of_states_is_kept_whole(searches: list[Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "NEARLY", -1.0)  # the deepest that there is room for
    spec = replace(ASSUMED, updates="backward")
    options = Options(1, "auto", "sequential", 1, 0, coverage="all")

    def timed(budget: int) -> Plan:
        asked = replace(options, budget_bytes=budget)
        return kept_plans.known_or_made(question()[0], asked, None, predictor(known=RATES), "a batch", spec)

    with pytest.raises(BudgetInfeasible) as refused:
        timed(1)
    budget = refused.value.smallest_budget_bytes + 30_000
    first, second = timed(budget), timed(budget)
    assert len(searches) == 1
    assert second == first
    assert first.policy.pieces.depth > DEPTH
    assert first.link is not None


def test_a_tight_plan_that_streams_and_recomputes_is_kept_whole(searches: list[Plan]) -> None:
    budget = smallest(Text(), text(2, 8)) * 21 // 20
    searches.clear()
    first, second = trained(budget), trained(budget)
    assert len(searches) == 1
    assert first.plan.streamed or first.plan.policy.save_from
    assert first.plan.considered
    assert second.plan == first.plan


def test_given_chunks_stay_the_very_ones(searches: list[Plan]) -> None:
    trained(chunks=3)
    module = compiled(Text(), "1GB", chunks=3)
    given = module.plan.chunks
    module(**text(2, 8))
    assert len(searches) == 1
    assert module.plan.chunks is given


def test_a_budget_that_is_too_small_is_refused_each_time(searches: list[Plan]) -> None:
    assert smallest(Text(), text(2, 8)) == smallest(Text(), text(2, 8))
    assert files() == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_each_optimizer_has_plans_of_its_own(searches: list[Plan], dtype: str) -> None:
    """What is assumed without an optimizer is AdamW with states in float32."""
    trained()
    module = compiled(Text(), "1GB")
    optimizer = chunkft_fx.AdamW(module, state_dtype=dtype)
    module(**text(2, 8))
    assert len(searches) == 1 + (optimizer.spec != ASSUMED)
    assert module.plan.policy.states == optimizer.spec


def test_each_model_and_batch_has_plans_of_its_own(searches: list[Plan]) -> None:
    models = [Text(), Text(width=32), Text(blocks=4), Text().double(), Text(), Text(), Text()]
    models[4].embed.requires_grad_(False)
    batches = [*([text(2, 8)] * 5), text(4, 8), text(2, 16)]
    for count, (model, batch) in enumerate(zip(models, batches, strict=True), start=1):
        module = compiled(model, "1GB")
        module(**batch)
        assert len(searches) == count
        assert module.plan.chunks is searches[-1].chunks


def test_passes_of_the_users_own_are_planned_for_anew(searches: list[Plan]) -> None:
    class Nothing:
        name = "nothing"

        def __call__(self, region: RegionGraph) -> int:
            return 0

    for _ in range(2):
        trained(region_passes=(Nothing(),))
    assert len(searches) == 2
    assert files() == []


def test_where_graphs_are_verified_every_plan_is_made_anew(
    searches: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned()
    monkeypatch.setenv("CHUNKFT_VERIFY", "1")
    planned()
    assert len(searches) == 2


# Each is given the text of the file of a kept plan, and returns what is found there later.
def _cut_short(text: str) -> str:
    return text[: len(text) // 2]


def _with_another_number(text: str) -> str:
    return text.replace('"interval": 1', '"interval": 2')


def _of_another_version(text: str) -> str:
    return _signed(text.partition("\n")[2].replace(f'"version": {VERSION}', '"version": 0'))


def _without_a_field(text: str) -> str:
    plan = json.loads(text.partition("\n")[2])
    del plan["policy"]["depth"]
    return _signed(json.dumps(plan))


def _above_its_budget(text: str) -> str:
    plan = json.loads(text.partition("\n")[2])
    return _signed(json.dumps(plan | {"predicted_peak_bytes": plan["budget_bytes"] + 1}))


def _with_less_than_it_needs(text: str) -> str:
    plan = json.loads(text.partition("\n")[2])
    return _signed(json.dumps(plan | {"predicted_peak_bytes": plan["predicted_peak_bytes"] // 2}))


def _without_a_prediction(text: str) -> str:
    return _signed(json.dumps(json.loads(text.partition("\n")[2]) | {"predicted_peak_bytes": None}))


def _signed(text: str) -> str:
    return f"{kept_plans._checksum(text)}\n{text}"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "", lambda text: "no plan", _cut_short, _with_another_number, _of_another_version,
        _without_a_field, _above_its_budget, _with_less_than_it_needs, _without_a_prediction,
        lambda text: _signed("null"), lambda text: _signed("no JSON"),
    ],
)  # fmt: skip
def test_a_plan_that_is_damaged_or_does_not_fit_is_made_anew_and_replaced(
    searches: list[Plan], damage: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    plan = planned()
    (path,) = files()
    whole = path.read_text()
    path.write_text(damage(whole))
    with caplog.at_level(logging.WARNING, logger="chunkft_fx.planning.kept_plans"):
        assert planned() == plan
    assert len(searches) == 2
    assert str(path) in caplog.text
    assert path.read_text() == whole


def test_a_plan_whose_first_step_needs_more_than_it_says_is_made_anew(
    searches: list[Plan], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As if the memory model had changed in a way that no digest tells of."""
    peak = planned().predicted_peak_bytes
    monkeypatch.setattr("chunkft_fx.predict.predictor.overhead", lambda device, nbytes, workspace: {"more": 1000})
    with caplog.at_level(logging.WARNING, logger="chunkft_fx.planning.kept_plans"):
        plan = planned()
    assert "needs" in caplog.text
    assert len(searches) == 2
    assert peak is not None
    assert plan.predicted_peak_bytes == peak + 1000


def test_without_a_folder_that_can_be_written_plans_are_made_anew(searches: list[Plan], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    planned()
    planned()
    assert len(searches) == 2


PROCESS = """
import sys, torch
from chunkft_fx.planning import kept_plans
from tests.support.changing_batches import Text, compiled, text
torch.set_num_threads(1)
torch.manual_seed(0)
module = compiled(Text(), "1GB", chunks=3)
print("ready", flush=True)
sys.stdin.readline()
module(**text(2, 8))
print(module.plan.to_json())
"""


@pytest.mark.slow
def test_processes_that_plan_at_once_keep_one_whole_plan(searches: list[Plan]) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    plans = [process.communicate("go\n", timeout=120)[0] for process in processes]
    assert plans[0] == plans[1] == trained(chunks=3).plan.to_json() + "\n"
    assert searches == []
    assert len(files()) == 1


def asked(**changed: Any) -> str:
    model, options, _ = question()
    usual: dict[str, Any] = {
        "model": model,
        "options": options,
        "known": None,
        "predictor": predictor(),
        "spec": ASSUMED,
    }
    return digest(**(usual | changed))


def test_the_digest_of_a_question_is_the_same_each_time() -> None:
    assert asked() == asked(model=copy.deepcopy(question()[0]), predictor=predictor(), known=None)


@pytest.mark.parametrize(
    "change",
    [
        {"absent": frozenset({"tangents_1"})}, {"known": RATES}, {"known": replace(RATES, launch_us=7.1)},
        {"sizes": Sizes((("s0", 8),))}, {"given": {"batch and constants": 1}}, {"given": {"batch and constants": 2}},
        {"spec": replace(ASSUMED, states="reset")},
    ],
)  # fmt: skip
def test_the_digest_tells_predictions_apart(change: dict[str, Any]) -> None:
    assert asked(predictor=predictor(**change)) != asked()


@pytest.mark.parametrize(
    "change",
    [
        {"budget_bytes": 2 * 10**9}, {"chunks": 2}, {"order": "random"}, {"interval": 2}, {"seed": 1},
        {"return_logits": True}, {"coverage": "all"},
    ],
)  # fmt: skip
def test_the_digest_tells_options_apart(change: dict[str, Any]) -> None:
    assert asked(options=replace(question()[1], **change)) != asked()


def test_the_example_that_is_planned_for_counts_by_its_sizes_alone() -> None:
    assert asked(options=replace(question()[1], batch=text(2, 8))) == asked()


@pytest.mark.parametrize(
    "spec",
    [
        replace(ASSUMED, states="reset"), replace(ASSUMED, master="remainder"), replace(ASSUMED, updates="backward"),
        replace(ASSUMED, update_nbytes=30), replace(ASSUMED, tensors=(StateTensor("exp_avg", "bfloat16"),)),
        replace(ASSUMED, is_whole=True),
    ],
)  # fmt: skip
def test_the_digest_tells_optimizers_apart(spec: StateSpec) -> None:
    assert asked(spec=spec) != asked()


def test_the_digest_tells_given_chunks_apart() -> None:
    model, options, _ = question()
    parameters = parameter_specs(model)
    plans = [Plan(options.budget_bytes, cut(parameters, n), "ascending", 1, 0) for n in (2, 3)]
    assert len({asked(), *(asked(known=plan) for plan in plans)}) == 3


@pytest.mark.parametrize("name", ["_library", "_versions", "settings_text", "device_key"])
def test_the_digest_tells_libraries_and_machines_apart(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = asked()
    monkeypatch.setattr(kept_plans, name, lambda *arguments: "another")
    assert asked() != before


def test_the_digest_tells_settings_of_torch_apart() -> None:
    before = asked()
    with functorch_config.patch(aggressive_recomputation=True):
        assert asked() != before
    with inductor_config.patch(realize_reads_threshold=7):
        assert asked() != before
    assert asked() == before


CHANGES: dict[str, Any] = {
    "primals": ("a",), "parameters": {"a": "b"}, "constants": {"c": torch.ones(2)}, "outputs": (1,),
    "mutations": (("a", "b"),), "gradients": {"a": "b"}, "tangents": {"a": 1}, "is_random": True, "effects": ("a",),
    "own_derivative": "a",
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_the_digest_tells_captures_apart(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    used = predictor()
    before = asked(predictor=used)
    monkeypatch.setattr(used.programs.capture, name, CHANGES[name])
    assert asked(predictor=used) != before


def test_every_field_of_a_capture_is_looked_at() -> None:
    (session,) = question()[2]._training.sessions
    # by which calls the graph came about, no plan depends on
    assert vars(session.capture).keys() == CHANGES.keys() | {"graph", "fake_mode", "path"}


def test_the_digest_tells_region_graphs_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    used = predictor()
    before = asked(predictor=used)
    region = used.programs.outline.regions[1]
    monkeypatch.setattr(region.template, "key", "another")
    assert asked(predictor=used) != before


def test_the_library_is_known_by_its_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def known() -> str:
        return kept_plans._library.__wrapped__()

    monkeypatch.setattr(chunkft_fx, "__file__", str(tmp_path / "package" / "__init__.py"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "rule.py").write_text("1")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "linked").symlink_to(tmp_path / "elsewhere")
    before = known()
    (tmp_path / "package" / "notes.txt").write_text("1")
    assert known() == before
    (tmp_path / "elsewhere" / "rule.py").write_text("2")
    after = known()
    (tmp_path / "elsewhere" / "rule.py").rename(tmp_path / "elsewhere" / "law.py")
    assert len({before, after, known()}) == 3

"""coverage="auto": all parameters where they fit and teach sooner, else a chunk a step; the plan says which and why."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import chunkft_fx
from chunkft_fx.copies import host_memory
from chunkft_fx.errors import BudgetInfeasible, ChunkFTWarning, OptionError
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.plan.chunk import Chunk, Slice
from chunkft_fx.plan.plan import Plan
from chunkft_fx.plan.policy import LinkUse
from chunkft_fx.plan.state_spec import ASSUMED
from chunkft_fx.planning.coverage import auto
from chunkft_fx.planning.coverage.auto import BEGUN, covering_plan
from chunkft_fx.planning.planner import Options
from chunkft_fx.predict.predictor import Predictor
from tests.planning.test_kept_plans import RATES
from tests.support.changing_batches import Text, compiled, smallest, text
from tests.support.forced_splits import unsplit
from tests.support.tiny_text import tiny_folder
from tests.tools.test_rates import CARD
from tests.tools.test_tools import EAGER, TEXT, chunkft

BATCH = text(2, 16)
LITTLE = 1000  # bytes, less than the states of any model
BATCHES = [text(2, 16, seed=seed) for seed in range(4)]


def trained(module: CompiledModule, **options: Any) -> dict[str, Tensor]:
    """The parameters after some steps."""
    optimizer = chunkft_fx.AdamW(module, lr=1e-2, **options)
    for batch in BATCHES:
        module(**batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("options", [{}, {"update": "backward"}, {"states": "reset"}], ids=str)
def test_what_is_trained_is_that_of_the_coverage_that_was_chosen(options: dict[str, Any]) -> None:
    model = Text()
    chosen = compiled(model, "1GB", coverage="auto")
    found = trained(chosen, **options)
    coverage = chosen.plan.coverage
    assert coverage == ("one" if "states" in options else "all")
    assert same(found, trained(compiled(model, "1GB", coverage=coverage), **options))


def test_the_choice_is_the_default_and_one_chunk_a_step_can_be_asked_for() -> None:
    module = chunkft_fx.compile(Text(), "1GB", backend="eager")
    module(**BATCH)
    assert module.plan.coverage == "all"
    assert "a step trains all parameters: times are not known here" in str(module.plan)
    asked = compiled(Text(), "1GB", coverage="one")
    asked(**BATCH)
    assert (asked.plan.coverage, asked.plan.coverage_reason) == ("one", "")
    assert "a step trains" not in str(asked.plan)


def test_too_little_host_memory_leaves_a_chunk_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Text()
    module = compiled(model, "1GB", coverage="auto")
    with monkeypatch.context() as patched:
        patched.setattr(host_memory, "available_nbytes", lambda: LITTLE)
        module(**BATCH)
    assert module.plan.coverage == "one" and not module.plan.policy.pieces
    assert "of host memory, of which 1000 B are available" in module.plan.coverage_reason
    shown = " ".join(str(module.plan).split())
    assert f"a step trains one chunk: {module.plan.coverage_reason}" in shown
    found = trained(module, states="reset")
    assert same(found, trained(compiled(model, "1GB"), states="reset"))


def test_gradients_that_wait_in_host_memory_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what the states are still to take."""
    model = Text()
    least = smallest(model, BATCH, coverage="all")
    module = compiled(model, least, coverage="auto")
    optimizer = chunkft_fx.AdamW(module)
    taken = optimizer.untaken_nbytes
    module(**BATCH)
    kinds = dict(module.plan.host_terms)
    assert module.plan.coverage == "all" and kinds["gradients"] > 0
    for short, coverage in ((1, "one"), (0, "all")):
        again = compiled(model, least, coverage="auto")
        held = chunkft_fx.AdamW(again)
        limit = taken + kinds["gradients"] - short
        monkeypatch.setattr(host_memory, "available_nbytes", lambda limit=limit: limit)
        again(**BATCH)
        assert again.plan.coverage == coverage
        assert held.untaken_nbytes == taken


def test_a_budget_that_all_parameters_do_not_fit_leaves_a_chunk_a_step() -> None:
    model = Text(32)
    every, one = (smallest(model, BATCH, coverage=coverage) for coverage in ("all", "one"))
    assert one < every
    module = compiled(model, every - 1, coverage="auto")
    module(**BATCH)
    assert module.plan.coverage == "one"
    assert module.plan.coverage_reason.startswith("a step that trains all parameters needs")
    enough = compiled(model, every, coverage="auto")
    enough(**BATCH)
    assert enough.plan.coverage == "all"
    hopeless = compiled(model, one - 1, coverage="auto")
    with unsplit(), pytest.raises(BudgetInfeasible) as refused:
        hopeless(**BATCH)
    assert refused.value.smallest_budget_bytes == one


def timed(count: int, us: float | None, host: int = 0) -> Plan:
    chunks = tuple(Chunk((Slice("w", 0, i, 1, count),), 1, 14) for i in range(count))
    return Plan(10**9, chunks, "ascending", 1, 0, predicted_step_us=us, host_terms=(("optimizer states", host),))


Answers = dict[str, Plan | BudgetInfeasible]


def decided(answers: Answers, options: Options | None = None, **more: Any) -> Plan:
    """The decision between two plans, as if they had been made."""

    def made(model: Any, asked: Options, *_: Any) -> Plan:
        answer = answers[asked.coverage]
        if isinstance(answer, BudgetInfeasible):
            raise answer
        return replace(answer, coverage=asked.coverage)

    asked = options or Options(10**9, "auto", "ascending", "auto", 0, coverage="auto")
    predictor: Callable[[], Predictor] = lambda: None  # type: ignore[assignment, return-value]  # noqa: E731
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(auto, "known_or_made", made)
        return covering_plan(Text(), asked, None, predictor, "a batch", ASSUMED, **more)


TIMES = st.floats(1.0, 1e7)


@given(TIMES, TIMES, st.integers(1, 40))
def test_all_parameters_are_trained_unless_a_sweep_takes_less(covering: float, each: float, count: int) -> None:
    plan = decided({"all": timed(1, covering), "one": timed(count, each)})
    assert plan.coverage == ("all" if covering <= count * each else "one")
    assert f"a sweep of {count} chunk(s)" in plan.coverage_reason
    assert "are taken to teach as much" in plan.coverage_reason


def test_where_a_sweep_takes_less_the_plan_says_so() -> None:
    plan = decided({"all": timed(1, 9000.0), "one": timed(2, 4000.0)})
    reason = "a step on all parameters takes 9 ms, a sweep of 2 chunk(s) 8 ms, and they are taken to teach as much"
    assert (plan.coverage, plan.coverage_reason) == ("one", reason)


def test_a_chunk_a_step_that_does_not_fit_leaves_all_parameters() -> None:
    plan = decided({"all": timed(1, 9000.0), "one": BudgetInfeasible("", 2**31, {})})
    assert plan.coverage == "all"
    assert plan.coverage_reason == "a step that trains one chunk needs 2.0 GiB of the device"


def test_the_smaller_of_two_budgets_that_are_not_enough_is_named() -> None:
    for sizes in ((5, 7), (7, 5)):
        answers: Answers = {c: BudgetInfeasible("", n, {}) for c, n in zip(("all", "one"), sizes, strict=True)}
        with pytest.raises(BudgetInfeasible) as refused:
            decided(answers)
        assert refused.value.smallest_budget_bytes == 5


def test_host_memory_of_another_machine_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available_nbytes", lambda: LITTLE)
    answers: Answers = {"all": timed(1, 5.0, host=10**6), "one": timed(4, 5.0, host=10**6)}
    assert decided(answers).coverage == "one"
    elsewhere: Any = object()
    options = Options(10**9, "auto", "ascending", "auto", 0, coverage="auto", rates=elsewhere)
    assert decided(answers, options).coverage == "all"
    assert decided(answers, untaken=LITTLE).coverage == "all"  # the others were taken before


def test_real_predictions_decide_where_rates_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the times of the plans that each coverage by itself has; a slower step of all parameters is not taken."""
    monkeypatch.setattr(Predictor, "rates", property(lambda _: RATES))
    plans = {}
    for coverage in ("all", "one", "auto"):
        module = compiled(Text(), "1GB", coverage=coverage)
        module(**BATCH)
        plans[coverage] = module.plan
    every, one = plans["all"].predicted_step_us, plans["one"].predicted_step_us
    assert every is not None and one is not None and every <= len(plans["one"].chunks) * one
    assert plans["auto"].coverage == "all" and plans["auto"].predicted_step_us == every
    clocked = Predictor.clocked

    def slow(self: Predictor, *arguments: Any) -> LinkUse | None:
        link = clocked(self, *arguments)
        return None if link is None else replace(link, step_us=link.step_us * 1000)

    monkeypatch.setattr(Predictor, "clocked", slow)
    module = compiled(Text(), "1GB", coverage="auto")
    module(**BATCH)
    assert module.plan.coverage == "one"
    assert module.plan.chunks == plans["one"].chunks and module.plan.predicted_step_us == one


@pytest.mark.parametrize(
    ("given", "of_optimizer", "coverage", "why"),
    [
        ({"chunks": 3}, {}, "one", "chunks=3"),
        ({"order": "random"}, {}, "one", "order='random'"),
        ({"interval": 2}, {}, "one", "interval=2"),
        ({}, {"states": "reset"}, "one", 'states="reset"'),
        ({}, {"update": "backward"}, "all", 'update="backward"'),
    ],
    ids=str,
)
def test_options_that_go_with_one_coverage_decide(
    given: dict[str, Any], of_optimizer: dict[str, Any], coverage: str, why: str
) -> None:
    module = compiled(Text(), "1GB", coverage="auto", **given)
    optimizer = chunkft_fx.AdamW(module, **of_optimizer)
    module(**BATCH)
    assert module.plan.coverage == coverage and why in module.plan.coverage_reason
    assert bool(module.plan.policy.pieces) == (coverage == "all")
    assert module._training.optimizer is optimizer
    assert Plan.from_json(module.plan.to_json()) == module.plan


def test_a_number_of_chunks_decides_before_any_batch() -> None:
    module = compiled(Text(), "1GB", coverage="auto", chunks=3)
    assert (module.plan.coverage, module.plan.coverage_reason) == ("one", "chunks=3 was given")
    assert "a step trains one chunk: chunks=3 was given" in str(module.plan)
    given = module.plan.chunks
    module(**BATCH)
    assert module.plan.chunks is given


@pytest.mark.parametrize(
    ("given", "of_optimizer", "why"),
    [
        ({"chunks": 3}, {"update": "backward"}, 'which is "one" because chunks=3'),
        ({"interval": 2}, {"update": "backward"}, "interval=2"),
        ({}, {"update": "backward", "states": "reset"}, 'states="reset"'),
        ({}, {"update": "backward", "max_grad_norm": 1.0}, "max_grad_norm"),
    ],
    ids=str,
)
def test_options_that_leave_no_coverage_are_refused(
    given: dict[str, Any], of_optimizer: dict[str, Any], why: str
) -> None:
    module = compiled(Text(), "1GB", coverage="auto", **given)
    with pytest.raises(OptionError, match=why):
        chunkft_fx.AdamW(module, **of_optimizer)


def test_an_optimizer_that_comes_when_gradients_are_held_finds_the_coverage_decided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(host_memory, "available_nbytes", lambda: LITTLE)
        module = compiled(Text(), "1GB", coverage="auto")
        module(**BATCH).backward()
    with pytest.raises(OptionError, match='trained with coverage="one" already'):
        chunkft_fx.AdamW(module, update="backward")
    module.zero_grad()
    optimizer = chunkft_fx.AdamW(module, update="backward")  # nothing is lost by deciding anew
    module(**BATCH).backward()
    optimizer.step()
    assert module.plan.coverage == "all"
    every = compiled(Text(), "1GB", coverage="auto")
    every(**BATCH).backward()
    with pytest.raises(OptionError, match='states="reset"'):
        chunkft_fx.AdamW(every, states="reset")


def test_before_training_has_begun_a_larger_batch_decides_anew() -> None:
    model = Text(32)
    large = text(2, 80)
    every, one = (smallest(model, large, coverage=coverage) for coverage in ("all", "one"))
    assert one < every
    module = compiled(model, every - 1, coverage="auto")
    module(**BATCH)
    assert module.plan.coverage == "all"
    module(**large)
    assert module.plan.coverage == "one"


def test_the_decision_stays_when_training_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a larger batch, without room for it, and when the model is captured and planned anew."""
    model = Text(32)
    large = text(2, 80)
    every = smallest(model, large, coverage="all")
    module = compiled(model, every - 1, coverage="auto")
    optimizer = chunkft_fx.AdamW(module)
    module(**BATCH).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert module.plan.coverage == "all"
    with pytest.raises(BudgetInfeasible):
        module(**large)
    assert module.plan.coverage == "all"
    monkeypatch.setattr(host_memory, "available_nbytes", lambda: LITTLE)
    module.vision.requires_grad_(False)
    module(**BATCH).backward()
    for batch in BATCHES:  # from the next sweep on the frozen weights are no part of the plan
        optimizer.step()
        optimizer.zero_grad()
        module(**batch).backward()
    assert not any(s.name.startswith("vision") for c in module.plan.chunks for s in c.slices)
    assert (module.plan.coverage, module.plan.coverage_reason) == ("all", BEGUN)


@pytest.mark.parametrize(("chunks", "coverage"), [(3, "one"), (1, "all")])
def test_a_run_goes_on_with_the_coverage_that_it_began_with(chunks: int, coverage: str) -> None:
    first = compiled(Text(), "1GB", chunks=chunks)
    trained(first)
    position = first._training.schedule_position()
    assert position is not None
    second = compiled(Text(), "1GB", coverage="auto")
    second._training.resume(position)
    # on the CPU a sweep has as few chunks as fit, which is one: the position is of no use, the decision is
    warns = pytest.warns(ChunkFTWarning, match="saved with 3 chunks") if chunks > 1 else contextlib.nullcontext()
    with warns:
        second(**BATCH)
    assert second.plan.coverage == coverage and second.plan.coverage_reason == BEGUN


def test_a_sweep_that_is_loaded_behind_the_choice_is_told_that_all_parameters_are_trained() -> None:
    first, second = compiled(Text(), "1GB", chunks=3), compiled(Text(), "1GB", coverage="auto")
    trained(first)
    second(**BATCH)
    position = first._training.schedule_position()
    assert position is not None
    about_chunks = pytest.warns(ChunkFTWarning, match="saved with 3 chunks")
    with about_chunks, pytest.warns(ChunkFTWarning, match='a chunk a step, and steps train.*coverage="one"'):
        second._training.resume(position)
    assert second.plan.coverage == "all"


def test_the_command_line_plans_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["tiny:llama", "--budget", "1GB", "--seq-len", "16", "--backend", "eager", "--coverage", "auto"]
    chunkft("plan", *options)
    printed = " ".join(capsys.readouterr().out.split())
    assert "a step trains all parameters: times are not known here" in printed
    chunkft("plan", *options, "--rates", CARD, "--dtype", "float32")
    printed = " ".join(capsys.readouterr().out.split())
    assert "a step trains all parameters: a step on all parameters takes" in printed


def test_the_command_line_trains_by_what_was_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, written, out = tiny_folder(tmp_path / "model"), tmp_path / "text.txt", tmp_path / "out"
    written.write_text(TEXT)
    chunkft(
        "train", str(model), str(written), "--out", str(out), *EAGER, "--coverage", "auto", "--update", "backward",
        "--max-grad-norm", "0", "--steps", "2", "--seq-len", "16",
    )  # fmt: skip
    assert "a step trains all parameters: update=" in capsys.readouterr().out

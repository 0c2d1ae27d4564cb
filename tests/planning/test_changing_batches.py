"""Plans hold for the batches that come: larger ones are planned before they run, or refused with nothing changed."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import chunkft_fx
from chunkft_fx.errors import BudgetInfeasible, OptionError
from tests.support.changing_batches import Text, attempt, compiled, is_same, run_sequence, smallest, state_of, text
from tests.support.forced_splits import unsplit

SHARES = (1.0, 1.2, 1.6, 3.0)
# one tight, one that refuses some, one ample
FAST = [(0, 1.0), (1, 1.2), (2, 3.0)]
SLOW = [(seed, SHARES[seed % len(SHARES)]) for seed in range(3, 25)]


@pytest.mark.parametrize(("seed", "share"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_no_sequence_of_batches_exceeds_the_budget(seed: int, share: float) -> None:
    """Where batches are split, they fit that would be refused."""
    splits = seed % 2 == 0
    with nullcontext() if splits else unsplit():
        trained, refused = run_sequence(seed, share)
    assert trained
    assert refused or splits or share > 1.6


def _gradients(batch: dict[str, Tensor], model: Text) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("first", "second", "large"),
    [
        (text(2, 16), text(2, 17), text(2, 400)),
        (text(2, 16), text(3, 16), text(60, 16)),
        (text(2, 16, 4), text(2, 16, 5), text(2, 16, 4000)),
    ],
    ids=["longer", "more rows", "larger image"],
)
def test_a_larger_batch_than_planned_is_refused_before_it_runs(
    first: dict[str, Tensor], second: dict[str, Tensor], large: dict[str, Tensor]
) -> None:
    model = Text()
    module = compiled(model, smallest(model, second, chunks=2) * 12 // 10, chunks=2)
    assert attempt(module, first)
    module.zero_grad()
    assert attempt(module, second)
    assert not attempt(module, large)
    assert attempt(module, second)


def test_a_larger_batch_after_steps_is_planned_or_refused_and_keeps_the_chunks() -> None:
    model = Text()
    budget = smallest(model, text(2, 40), chunks=3) * 11 // 10
    module = compiled(model, budget, chunks=3)
    optimizer = chunkft_fx.AdamW(module, lr=1e-3)
    for length in (4, 5, 6, 30, 400):
        chunks = module.plan.chunks if length > 5 else None
        trained = attempt(module, text(2, length))
        assert trained == (length < 400)
        assert chunks is None or module.plan.chunks is chunks
        optimizer.step()
        optimizer.zero_grad()


def test_the_number_of_chunks_is_that_of_the_largest_batch_until_a_sweep_begins() -> None:
    model = Text()
    large = text(4, 64)
    budget = smallest(model, large) * 11 // 10
    alone = compiled(model, budget)
    alone(**large)
    module = compiled(model, budget)
    assert attempt(module, text(2, 4))
    few = len(module.plan.chunks)
    module.zero_grad()
    assert few < len(alone.plan.chunks)
    assert attempt(module, large)
    assert len(module.plan.chunks) == len(alone.plan.chunks)
    module.zero_grad()
    # a smaller one does not bring the fewer chunks back
    assert attempt(module, text(2, 4))
    assert len(module.plan.chunks) == len(alone.plan.chunks)


def test_gradients_that_are_held_keep_their_chunks() -> None:
    model = Text()
    budget = smallest(model, text(4, 64)) * 11 // 10
    module = compiled(model, budget)
    assert attempt(module, text(2, 4))
    plan = module.plan
    with unsplit():
        assert not attempt(module, text(4, 64))
    assert module.plan is plan
    assert any(s.grad is not None for s in module.active_slices())


def test_a_refused_batch_says_how_to_have_chunks_chosen_for_it() -> None:
    model = Text()
    module = compiled(model, smallest(model, text(4, 64)) * 11 // 10)
    attempt(module, text(2, 4))
    with unsplit(), pytest.raises(BudgetInfeasible, match="batch="):
        module(**text(4, 64))


def test_gradients_are_right_whatever_plan_a_length_runs_under() -> None:
    model = Text().double()
    module = compiled(model, smallest(model, text(3, 40), chunks=1) * 11 // 10, chunks=1)
    for rows, length in ((2, 8), (2, 9), (3, 40), (2, 30), (3, 7)):
        batch = text(rows, length, seed=length)
        module(**batch).backward()
        want = _gradients(batch, model)
        for s in module.active_slices():
            if s.name in want:
                torch.testing.assert_close(s.grad, want[s.name], rtol=1e-9, atol=1e-12)
        module.zero_grad()


@pytest.mark.parametrize("kind", [pytest.param("real", marks=pytest.mark.slow), "meta"])
def test_an_example_of_the_largest_batch_is_planned_for_first(kind: str) -> None:
    model = Text()
    large = text(4, 64)
    example = large if kind == "real" else {n: t.to("meta") for n, t in large.items()}
    budget = smallest(model, large) * 11 // 10
    alone = compiled(model, budget)
    alone(**large)
    module = compiled(model, budget, batch=example)
    optimizer = chunkft_fx.AdamW(module, lr=1e-3)
    for step, (rows, length) in enumerate(((2, 4), (2, 30), (4, 64), (3, 9))):
        assert attempt(module, text(rows, length, seed=step))
        assert len(module.plan.chunks) == len(alone.plan.chunks)
        optimizer.step()
        optimizer.zero_grad()
    assert not attempt(module, text(4, 640))


def test_an_example_that_fits_no_plan_is_refused_at_the_first_call() -> None:
    model = Text()
    small = text(2, 4)
    module = compiled(model, smallest(model, small) * 11 // 10, batch=text(40, 64))
    before = state_of(module)
    with pytest.raises(BudgetInfeasible, match=r"40, 64"):
        module(**small)
    assert is_same(before, state_of(module))


def test_an_example_is_the_arguments_of_a_call() -> None:
    large = text(4, 64)
    module = compiled(Text(), "1GB", batch=(large["ids"], large["labels"]))
    module(**text(2, 4))
    assert "[4, 64]" in module.plan.batch
    with pytest.raises(OptionError, match="batch=int"):
        compiled(Text(), "1GB", batch=64)

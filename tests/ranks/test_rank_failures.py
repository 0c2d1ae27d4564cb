"""Ranks that disagree, fail or die: all stop with an error that says which one and why, and none waits for ever."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import chunkft_fx
from chunkft_fx.errors import RankFailed, RanksDisagree
from chunkft_fx.ranks.meeting import LOOK_S
from tests.support.rank_runs import Case, batch, losses_of, made, model_of
from tests.support.tiny_lm import lm_batch, tiny_lm
from tests.support.worlds import World

ONE = {"coverage": "one", "chunks": 3}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with closing(World(2)) as found:
        yield found


def raised(world: World, function: Any, *arguments: Any) -> list[BaseException]:
    """By rank: what a function raises there."""
    world.begin(function, *arguments)
    found = world.results()
    assert all(isinstance(result, BaseException) for result in found), found
    return found


def other_options() -> None:
    """Compile with another number of chunks on each rank."""
    chunkft_fx.compile(tiny_lm(), "1GB", chunks=2 + dist.get_rank(), backend="eager")


def other_models() -> None:
    """Compile another model on each rank."""
    model: Any = tiny_lm() if dist.get_rank() else model_of(0)
    chunkft_fx.compile(model, "1GB", chunks=2, backend="eager")


def other_rates() -> None:
    """Step with another learning rate on each rank."""
    compiled = chunkft_fx.compile(tiny_lm(), "1GB", chunks=2, backend="eager")
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2 * (1 + dist.get_rank()))
    compiled(**lm_batch()).backward()
    optimizer.step()


def other_optimizers() -> None:
    """Make another optimizer on each rank."""
    compiled = chunkft_fx.compile(tiny_lm(), "1GB", chunks=2, backend="eager")
    kind: Any = (chunkft_fx.SGD, chunkft_fx.AdamW)[dist.get_rank()]
    kind(compiled, lr=1e-2)


def parts_used_by_one() -> None:
    """Use a matrix on one rank alone, where each piece is updated in the backward."""
    case = Case({"coverage": "all"}, {"update": "backward"}, uses=(False, True))
    compiled, optimizer = made(case)
    losses_of(case, compiled, optimizer, range(1), dist.get_rank(), 2)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (other_options, "ranks differ in options"),
        (other_models, "ranks differ in the model"),
        (other_optimizers, "ranks differ in the optimizer"),
        (other_rates, "learning rates"),
        (parts_used_by_one, r"'extra\.weight'|extra\.weight has a gradient on one of ranks"),
    ],
)
def test_ranks_that_disagree_all_say_so(world: World, function: Any, message: str) -> None:
    for error in raised(world, function):
        assert isinstance(error, RanksDisagree)
        with pytest.raises(RanksDisagree, match=message):
            raise error


def fails_on_rank_1() -> None:
    """Train, with a batch on rank 1 that the model cannot take at step 2."""
    compiled, optimizer = made(Case(ONE))
    for step in range(4):
        inputs = batch(step, 0)
        if step == 2 and dist.get_rank() == 1:
            inputs["labels"] = inputs["labels"] + 1000
        compiled(**inputs).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_an_error_of_one_rank_ends_all_with_its_words(world: World) -> None:
    begin = time.monotonic()
    first, second = raised(world, fails_on_rank_1)
    assert isinstance(second, RuntimeError)
    assert not isinstance(second, RankFailed)
    assert isinstance(first, RankFailed)
    assert "rank 1 failed (RuntimeError: index 10" in str(first)
    assert time.monotonic() - begin < 60


def refused_and_gone_on() -> int:
    """Train on after a batch that the model cannot take on any rank, the second slowly."""
    compiled, optimizer = made(Case(ONE))
    wrong = batch(0, 0)
    with pytest.raises(RuntimeError):
        compiled(wrong["ids"], wrong["labels"] + 1000)
    for step in range(2):
        time.sleep(2.0 * LOOK_S * dist.get_rank())
        losses_of(Case(ONE), compiled, optimizer, range(step, step + 1), dist.get_rank(), 2)
    return 0


def test_an_error_that_all_ranks_went_on_from_is_forgotten(world: World) -> None:
    assert world.run(refused_and_gone_on) == [0, 0]


def one_step_more_on_rank_0() -> int:
    """Train a step more on rank 0, which then finds nobody there."""
    compiled, optimizer = made(Case(ONE))
    losses_of(Case(ONE), compiled, optimizer, range(2), dist.get_rank(), 2)
    if dist.get_rank() == 0:
        compiled(**batch(2, 0)).backward()
    return 0


def test_a_rank_that_makes_a_step_more_is_told_that_the_others_ended(world: World) -> None:
    world.begin(one_step_more_on_rank_0)
    first, second = world.results()
    assert second == 0
    assert isinstance(first, RankFailed)
    assert "rank 1 failed (it has let the model go" in str(first)


def other_budgets() -> tuple[int, str]:
    """Plan under half of the budget on rank 1; how many chunks there are, and what step they were cut by."""
    model = model_of(0)
    needed = sum(p.nbytes for p in model.parameters())
    budget = int(needed * (6 if dist.get_rank() else 60))
    compiled = chunkft_fx.compile(model, budget, coverage="one", backend="eager")
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2)
    losses_of(Case(ONE), compiled, optimizer, range(3), dist.get_rank(), 2)
    return len(compiled.plan.chunks), repr(compiled.plan.chunks)


def test_ranks_are_cut_alike_by_the_smallest_budget(world: World) -> None:
    (count, first), (_, second) = world.run(other_budgets)
    assert count > 1
    assert first == second


def trains_on(seconds: float, folder: str) -> None:
    """Train for so long, without collectives of the user's own; a file in the folder tells that a step was made."""
    compiled, optimizer = made(Case(ONE))
    end, step = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        compiled(**batch(step, dist.get_rank())).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        Path(folder, str(dist.get_rank())).touch()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_with_its_name(victim: int, tmp_path: Path) -> None:
    with closing(World(3)) as world:
        world.begin(trains_on, 200.0, str(tmp_path))
        while len([*tmp_path.iterdir()]) < world.size:
            time.sleep(0.1)
        pid = world.processes[victim].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        begin = time.monotonic()
        found = world.results(90)
        assert time.monotonic() - begin < 60
    for rank, result in enumerate(found):
        if rank != victim:
            assert isinstance(result, RankFailed)
            assert f"rank {victim}" in str(result)

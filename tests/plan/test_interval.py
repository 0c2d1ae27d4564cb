"""The interval that "auto" stands for: turns long enough for a sweep of 40 steps, and never longer than that needs."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import chunkft_fx
from chunkft_fx.errors import CheckpointMismatch, ChunkFTWarning, OptionError
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.plan.schedule import SAFE_SHARE, STEPS_OF_SWEEP, WARMUP_UPDATES, interval_of
from chunkft_fx.tools import plan
from chunkft_fx.tools.training import train
from chunkft_fx.tools.training.options import turn_steps
from chunkft_fx.tools.zoo import tiny
from tests.support.block_net import block_batch, block_net


@given(st.integers(2, 300))
def test_turns_are_the_shortest_that_give_a_sweep_its_steps(chunks: int) -> None:
    turn = interval_of("auto", chunks)
    assert chunks * turn >= STEPS_OF_SWEEP > chunks * (turn - 1)
    assert turn == 1 or chunks < STEPS_OF_SWEEP


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_number_is_taken_as_it_is(interval: int, chunks: int) -> None:
    assert interval_of(interval, chunks) == interval


def compiled(**options: Any) -> CompiledModule:
    torch.manual_seed(0)
    return chunkft_fx.compile(block_net(torch.float64), "1GB", backend="eager", **options)


@pytest.mark.parametrize(("chunks", "turn"), [(1, 1), (2, 20), (3, 14), (8, 5), (39, 2), (40, 1), (64, 1)])
def test_the_default_goes_by_the_number_of_chunks(chunks: int, turn: int) -> None:
    assert compiled(chunks=chunks).plan.interval == turn
    assert compiled(chunks=chunks, interval="auto").plan.interval == turn
    assert compiled(chunks=chunks, interval=7).plan.interval == 7


def test_all_parameters_take_no_turns() -> None:
    module = compiled(coverage="all")
    assert module.plan.interval == 1


@pytest.mark.parametrize(("chunks", "interval"), [(2, 1), (2, 3), (8, 2), (15, 2)])
def test_turns_that_may_diverge_are_warned_of_once_with_the_figure(chunks: int, interval: int) -> None:
    module = compiled(chunks=chunks, interval=interval)
    optimizer = chunkft_fx.AdamW(module, lr=1e-3)
    limits = f"stable up to a rate of about 2, dense steps up to {38 / chunks:.2g} "
    with pytest.warns(ChunkFTWarning, match=f"{chunks} chunks in turns of {interval} can diverge.*{limits}"):
        trained(module, optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ChunkFTWarning)
        trained(module, optimizer, 2)


@pytest.mark.parametrize(("chunks", "interval"), [(1, 1), (2, "auto"), (2, 4), (14, "auto"), (16, 1), (64, 1)])
def test_turns_that_are_as_stable_as_dense_steps_are_not_warned_of(chunks: int, interval: int | str) -> None:
    module = compiled(chunks=chunks, interval=interval)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ChunkFTWarning)
        trained(module, chunkft_fx.AdamW(module, lr=1e-3), 1)


def test_the_plan_says_that_given_turns_are_short() -> None:
    said = 'interval="auto" takes 20'
    assert said in str(compiled(chunks=2, interval=1).plan)
    assert said not in str(compiled(chunks=2).plan)
    assert said not in str(compiled(chunks=2, interval=20).plan)
    assert "20 steps each" in str(compiled(chunks=2).plan)


@pytest.mark.parametrize(("chunks", "interval"), [(2, 20), (15, 3)])
def test_the_plan_says_why_turns_are_as_long_as_auto_has_them(chunks: int, interval: int) -> None:
    shown = " ".join(str(compiled(chunks=chunks).plan).split())
    assert (
        f'turns of {interval} steps are those of interval="auto": {chunks} chunks in turns of one step can diverge'
        in shown
    )


@pytest.mark.parametrize("options", [{"chunks": 1}, {"chunks": 16}, {"chunks": 64}, {"chunks": 2, "interval": 21}])
def test_the_plan_says_nothing_of_turns_where_shorter_ones_would_do_or_others_were_given(options: Any) -> None:
    assert "can diverge" not in str(compiled(**options).plan)


@pytest.mark.parametrize("command", [train.command, plan.command])
def test_commands_leave_the_interval_to_auto(command: Callable[..., None]) -> None:
    default = inspect.signature(command).parameters["interval"].default
    assert default == turn_steps(default) == "auto"


@given(st.integers(1, 10**6))
def test_commands_take_a_number_of_steps(steps: int) -> None:
    assert turn_steps(str(steps)) == steps


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "soon", "", "Auto"])
def test_commands_refuse_anything_else(text: str) -> None:
    with pytest.raises(OptionError, match='whole number of optimizer steps, 1 or more, or "auto"'):
        turn_steps(text)


@pytest.mark.parametrize("interval", ["twice", "1", 0, -1, 1.5, True, None])
def test_anything_else_is_refused(interval: Any) -> None:
    with pytest.raises(OptionError, match='whole number of optimizer steps, 1 or more, or "auto"'):
        compiled(chunks=2, interval=interval)


def trained(module: CompiledModule, optimizer: chunkft_fx.AdamW, steps: int, begin: int = 0) -> None:
    for step in range(begin, begin + steps):
        module(block_batch(step, torch.float64)).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_run_under_auto_is_one_by_hand_whose_chunks_warm_up() -> None:
    """One step for each chunk first, then turns of 20; rates of each chunk rise over its own updates."""
    auto, by_hand = compiled(chunks=2), compiled(chunks=2, interval=1)
    trained(auto, chunkft_fx.AdamW(auto, lr=1e-2), 45)
    optimizer = chunkft_fx.AdamW(by_hand, lr=1e-2, schedule_by="step")
    weights = torch.cat([p.detach().flatten() for p in by_hand.parameters()])
    safe, updates = SAFE_SHARE * float(weights.square().mean().sqrt()), [0, 0]
    assert 1e-2 / WARMUP_UPDATES < safe < 1e-2
    for step, chunk in enumerate([0, 1, *[0] * 20, *[1] * 20, 0, 0, 0]):
        by_hand.activate(chunk)
        updates[chunk] += 1
        optimizer.param_groups[0]["lr"] = max(1e-2 * min(1.0, updates[chunk] / WARMUP_UPDATES), safe)
        trained(by_hand, optimizer, 1, step)
    for name, value in auto.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 5, 23])
def test_a_run_under_auto_goes_on_within_the_first_sweep_a_warm_up_and_a_turn(steps: int) -> None:
    first = compiled(chunks=2)
    optimizer = chunkft_fx.AdamW(first, lr=1e-2)
    trained(first, optimizer, steps)
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    resumed = compiled(chunks=2)
    resumed.load_state_dict(saved[0])
    second = chunkft_fx.AdamW(resumed, lr=1e-2)
    second.load_state_dict(saved[1])
    for run, its in ((first, optimizer), (resumed, second)):
        trained(run, its, 24, steps)
    for name, value in first.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_turns_that_were_given_do_not_warm_up() -> None:
    module = compiled(chunks=2, interval=20)
    optimizer = chunkft_fx.AdamW(module, lr=1e-2)
    trained(module, optimizer, 1)
    assert (module.chunk, module.schedule.steps, optimizer.last_rates) == (0, 1, (1e-2,))
    assert "chunks warm up" not in str(module.plan)
    assert "chunks warm up: the first sweep takes 2 steps" in str(compiled(chunks=2).plan)
    assert not compiled(chunks=1).plan.warms_up


def test_a_saved_run_of_given_turns_of_the_usual_length_is_refused_under_auto_and_taken_where_it_is_given() -> None:
    """It had no first sweep of single steps, also in the first version of the format, which could not say so."""
    first = compiled(chunks=2, interval=20)
    optimizer = chunkft_fx.AdamW(first, lr=1e-2)
    trained(first, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    old = copy.deepcopy(saved)
    old["chunkft"]["position"].pop("warms_up")
    old["chunkft"]["position"]["version"] = 1
    old["chunkft"]["rates"].pop("updates")
    for state in (saved, old):
        with pytest.raises(CheckpointMismatch, match=r"warms_up False \(now True\).* interval=20 and budget"):
            chunkft_fx.AdamW(compiled(chunks=2), lr=1e-2).load_state_dict(copy.deepcopy(state))
        second = compiled(chunks=2, interval=20)
        chunkft_fx.AdamW(second, lr=1e-2).load_state_dict(copy.deepcopy(state))
        assert second.schedule.steps == 3


def test_a_position_within_a_turn_of_another_length_is_refused() -> None:
    first = compiled(chunks=2, interval=2)
    optimizer = chunkft_fx.AdamW(first, lr=1e-2)
    trained(first, optimizer, 1)
    second = compiled(chunks=2)
    with pytest.raises(CheckpointMismatch, match=r"interval 2 \(now 20\)"):
        chunkft_fx.AdamW(second, lr=1e-2).load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_a_run_in_turns_of_another_length_goes_on_if_they_are_given_and_is_refused_under_auto() -> None:
    """Also between two turns, where counts mean the same: nobody asked for other turns."""
    first = compiled(chunks=2, interval=1)
    optimizer = chunkft_fx.AdamW(first, lr=1e-2)
    trained(first, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    second = compiled(chunks=2)
    unchanged = chunkft_fx.AdamW(second, lr=1e-2)
    with pytest.raises(CheckpointMismatch, match=r"interval 1 \(now 20\).* compile with .* interval=1 and budget"):
        unchanged.load_state_dict(saved)
    assert not unchanged.state and second.schedule.state_dict()["position"] == second.schedule.sweep == 0
    for interval in (1, 5):
        third = compiled(chunks=2, interval=interval)
        chunkft_fx.AdamW(third, lr=1e-2).load_state_dict(saved)
        assert (third.schedule.sweep, third.schedule.position, third.schedule.steps) == (1, 1, 0)


def test_without_a_plan_auto_is_held_against_a_saved_interval_at_the_batch_that_makes_it() -> None:
    model, batch = tiny("mlp")

    def begun(**options: Any) -> tuple[CompiledModule, chunkft_fx.AdamW]:
        module = chunkft_fx.compile(copy.deepcopy(model), "95kB", backend="eager", **options)
        return module, chunkft_fx.AdamW(module)

    first, optimizer = begun(interval=1)
    first(**batch(2, 4, 0))[0].backward()
    optimizer.step()
    chunks = len(first.plan.chunks)
    assert 1 < chunks < STEPS_OF_SWEEP
    second, resumed = begun()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    weights = copy.deepcopy(second.state_dict())
    with pytest.raises(CheckpointMismatch, match=rf"interval 1 \(now {interval_of('auto', chunks)}\)"):
        second(**batch(2, 4, 0))
    assert all(torch.equal(value, weights[name]) for name, value in second.state_dict().items())


def test_one_chunk_takes_no_turns_whose_length_could_have_been_saved() -> None:
    first = compiled(chunks=1, interval=3)
    optimizer = chunkft_fx.AdamW(first, lr=1e-2)
    trained(first, optimizer, 3)
    second = compiled(chunks=1)
    chunkft_fx.AdamW(second, lr=1e-2).load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert (second.schedule.sweep, second.schedule.steps) == (1, 0)

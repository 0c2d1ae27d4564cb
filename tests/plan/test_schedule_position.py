"""Saved positions: refused where their counts would mean something else, said where they mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import chunkft_fx
from chunkft_fx.errors import CheckpointMismatch, ChunkFTWarning
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.plan.cuts import ParameterSpec, cut
from chunkft_fx.plan.schedule import ChunkSchedule, cuts_digest
from chunkft_fx.tools.zoo import tiny

BATCH = (2, 4, 0)


def compiled(chunks: int | str = 3, budget: str = "1GB", **options: Any) -> CompiledModule:
    return chunkft_fx.compile(tiny("mlp")[0], budget, chunks=chunks, **{"interval": 1, "backend": "eager", **options})


def step(module: CompiledModule, optimizer: chunkft_fx.AdamW) -> None:
    module(**tiny("mlp")[1](*BATCH))[0].backward()
    optimizer.step()
    optimizer.zero_grad()


def saved(steps: int = 2, **options: Any) -> dict[str, Any]:
    """An optimizer's checkpoint after some steps of a real model."""
    module = compiled(**options)
    optimizer = chunkft_fx.AdamW(module)
    for _ in range(steps):
        step(module, optimizer)
    return optimizer.state_dict()


def test_a_position_names_what_it_counts_over() -> None:
    position = saved(order="random", seed=7, interval=2)["chunkft"]["position"]
    module = compiled(order="random", seed=7, interval=2)
    assert position == {
        "version": 2, "sweep": 0, "position": 1, "steps": 0, "chunks": 3,
        "order": "random", "seed": 7, "interval": 2, "cuts": cuts_digest(module.plan.chunks),
        "warms_up": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"order": "descending"}, r"order ascending \(now descending\)"),
        ({"order": "descending"}, {"order": "random"}, r"order descending \(now random\)"),
        ({"order": "random", "seed": 1}, {"order": "random", "seed": 2}, r"seed 1 \(now 2\)"),
        ({"interval": 3}, {"interval": 4}, r"interval 3 \(now 4\)"),
    ],
)
def test_a_position_of_another_order_seed_or_interval_is_refused_before_anything_changes(
    before: dict[str, Any], now: dict[str, Any], message: str
) -> None:
    for chunks in (3, "auto"):
        module = compiled(chunks, **now)
        optimizer = chunkft_fx.AdamW(module)
        with pytest.raises(CheckpointMismatch, match=message):
            optimizer.load_state_dict(saved(**before))
        assert not optimizer.state
        assert module._training.schedule_position() == (None if chunks == "auto" else module.schedule.state_dict())
        step(module, optimizer)  # and training goes on from the start
        assert module.schedule.sweep + module.schedule.position + module.schedule.steps == 1


@pytest.mark.parametrize(
    ("before", "now"), [({"seed": 1}, {"seed": 2}), ({"interval": 2}, {"interval": 3}), ({"order": "descending"}, {})]
)
def test_what_does_not_change_the_meaning_is_taken(before: dict[str, Any], now: dict[str, Any]) -> None:
    state = saved(2, **before)  # in both at the start of a chunk's interval
    module = compiled(**(before | now))
    chunkft_fx.AdamW(module).load_state_dict(state)
    assert module.schedule.state_dict() == state["chunkft"]["position"] | (
        {"seed": module.plan.seed, "interval": module.plan.interval}
    )


def other_cuts(state: dict[str, Any]) -> dict[str, Any]:
    state["chunkft"]["position"]["cuts"] = "0123456789abcdef"
    return state


def test_a_position_over_other_cuts_is_refused() -> None:
    module = compiled()
    optimizer = chunkft_fx.AdamW(module)
    with pytest.raises(CheckpointMismatch, match="cuts 0123456789abcdef"):
        optimizer.load_state_dict(other_cuts(saved()))
    assert not optimizer.state
    assert module.schedule.position == 0


def test_without_a_plan_other_cuts_are_refused_by_the_batch_that_makes_it() -> None:
    state = saved(1, chunks="auto")
    module = compiled("auto")
    optimizer = chunkft_fx.AdamW(module)
    optimizer.load_state_dict(other_cuts(state))
    weights = {n: p.clone() for n, p in module.named_parameters()}
    with pytest.raises(CheckpointMismatch, match="cuts"):
        step(module, optimizer)
    assert all(torch.equal(p, weights[n]) for n, p in module.named_parameters())
    state["chunkft"]["position"] = None  # as the message says
    fresh = compiled("auto")
    resumed = chunkft_fx.AdamW(fresh)
    resumed.load_state_dict(state)
    step(fresh, resumed)
    assert resumed.state[next(fresh.parameters())]["slice_steps"][0].step == 2


def test_models_cut_in_other_places_have_other_digests() -> None:
    def cuts(sizes: list[int], chunks: int) -> str:
        return cuts_digest(cut([ParameterSpec(f"p{i}", (s, 64), 12, 0) for i, s in enumerate(sizes)], chunks))

    digests = [cuts([64, 64, 64], 2), cuts([64, 128], 2), cuts([128, 64], 2), cuts([64, 64, 64], 3)]
    assert len(set(digests)) == 4
    assert cuts([64, 64, 64], 2) == digests[0]


def test_another_number_of_chunks_begins_a_new_sweep_and_says_so() -> None:
    state = saved(2)
    module = compiled(4)
    optimizer = chunkft_fx.AdamW(module)
    with pytest.warns(ChunkFTWarning, match="saved with 3 chunks and means nothing with 4"):
        optimizer.load_state_dict(state)
    assert module.schedule.position == module.schedule.sweep == 0
    assert optimizer.state


@pytest.mark.parametrize("version", [None, 0, 3, "1"])
def test_a_position_of_another_version_is_refused_before_anything_changes(version: Any) -> None:
    state = saved(2)
    state["chunkft"]["position"]["version"] = version
    for module in (compiled(3), compiled("auto")):
        optimizer = chunkft_fx.AdamW(module)
        with pytest.raises(CheckpointMismatch, match=r"reads versions up to 2; .* to None to begin a new sweep"):
            optimizer.load_state_dict(state)
        assert not optimizer.state


def test_a_position_saved_again_before_there_is_a_plan_is_not_lost() -> None:
    state = saved(1, chunks="auto")
    module = compiled("auto")
    optimizer = chunkft_fx.AdamW(module)
    optimizer.load_state_dict(state)
    assert optimizer.state_dict()["chunkft"]["position"] == state["chunkft"]["position"]


@pytest.mark.parametrize(
    "change",
    [
        lambda p: [p.pop(key) for key in ("order", "seed", "interval", "cuts")],
        lambda p: p.pop("cuts"),
        lambda p: p.update(cuts=3),
        lambda p: p.pop("warms_up"),
        lambda p: p.update(warms_up=1),
        lambda p: p.update(order=None),
        lambda p: p.update(seed="0"),
        lambda p: p.update(interval=1.5),
        lambda p: p.update(steps=True),
        lambda p: p.update(sweep=-1),
    ],
)
def test_a_position_that_is_half_of_one_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    position = ChunkSchedule(3).state_dict()
    change(position)
    for module in (compiled(3), compiled("auto")):
        with pytest.raises(CheckpointMismatch, match="not a position"):
            module._training.resume(position)

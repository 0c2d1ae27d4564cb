"""Plans: JSON round trips, what is refused as JSON, and the table."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkft_fx.plan.chunk import Chunk, Slice
from chunkft_fx.plan.cuts import ParameterSpec, cut
from chunkft_fx.plan.pieces import Pieces
from chunkft_fx.plan.plan import VERSION, Plan
from chunkft_fx.plan.policy import Policy, StepTimes
from chunkft_fx.plan.state_spec import StateSpec, StateTensor
from chunkft_fx.plan.table import Considered

SLICES = (
    Slice("embed.weight", 0, 0, 512, 512),
    Slice("layers.0.up.weight", 0, 0, 128, 512),
    Slice("pos", 1, 64, 64, 197),
)
PLAN = Plan(
    budget_bytes=2**30,
    chunks=(Chunk(SLICES, 1_234_567, 5 * 2**20), Chunk(SLICES[1:], 99, 300), Chunk(SLICES[:1], 7, 28)),
    order="random",
    interval=3,
    seed=11,
    policy=Policy(save_from=2, streamed=frozenset({"pos", "embed.weight"})),
    predicted_peak_bytes=2**29,
    terms=(("weights and buffers", 2**28), ("activations", 2**28)),
    batch="a batch of 8x1024 tokens",
)

names = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=20)
counts = st.integers(0, 2**50)
slices = st.builds(Slice, names, st.integers(0, 4), counts, counts, counts)
plans = st.builds(
    Plan,
    budget_bytes=st.integers(1, 2**50),
    chunks=st.lists(
        st.builds(
            Chunk,
            slices=st.lists(slices, min_size=1, max_size=4).map(tuple),
            numel=counts,
            nbytes=counts,
        ),
        min_size=1,
        max_size=4,
    ).map(tuple),
    order=st.sampled_from(["ascending", "descending", "random"]),
    interval=st.integers(1, 100),
    seed=counts,
    policy=st.builds(Policy, counts, counts, st.integers(1, 8), st.frozensets(names, max_size=4), st.integers(2, 4)),
    predicted_peak_bytes=st.none() | counts,
    terms=st.lists(st.tuples(names, counts), max_size=4).map(tuple),
    batch=names,
)


@given(plans)
def test_json_holds_every_field(plan: Plan) -> None:
    read = json.loads(plan.to_json())
    assert read.pop("version") == VERSION
    assert set(read) == {f.name for f in dataclasses.fields(Plan)}
    assert read["policy"]["streamed"] == sorted(plan.policy.streamed)
    assert [len(c["slices"]) for c in read["chunks"]] == [len(c.slices) for c in plan.chunks]
    assert read["predicted_peak_bytes"] == plan.predicted_peak_bytes


@given(plans)
def test_a_plan_is_read_as_it_was_written(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


def test_all_that_a_plan_can_hold_is_read_as_it_was_written() -> None:
    times = StepTimes((1.0, 2.5), (3.0,), (), (1e-9,), (0.0,), (7.0,), 1 / 3, 1e300, ((1, 0.0), (4, 0.5)))
    states = StateSpec("Adafactor", (StateTensor("row", of="matrices", mean_over=-1),), is_whole=True)
    policy = Policy(pacing=times, states=states, pieces=Pieces(PLAN.chunks, 7), in_backward=True)
    considered = (Considered(3, 2, policy, 7, None, "weights"), Considered(1, 0, Policy(), 8, 2.5, "outputs"))
    plan = dataclasses.replace(
        PLAN, policy=policy, predicted_peak_bytes=None, predicted_step_us=0.1, considered=considered
    )
    assert Plan.from_json(plan.to_json()) == plan


def _changed(place: str, value: object) -> str:
    content: Any = json.loads(PLAN.to_json())
    *parents, last = place.split(".")
    inner = content
    for name in parents:
        inner = inner[int(name)] if name.isdigit() else inner[name]
    inner[int(last) if last.isdigit() else last] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "Expecting value"), ("[]", "version None"), (_changed("version", 2), "version 2"),
        (_changed("more", 1), "more"),
        (_changed("seed", "11"), "plan.seed is '11'"), (_changed("interval", 1.0), "plan.interval is 1.0"),
        (_changed("interval", True), "plan.interval is True"), (_changed("chunks", {}), "plan.chunks is {}"),
        (_changed("chunks.0.slices.1.length", None), "plan.chunks.slices.length is None"),
        (_changed("policy.streamed", "pos"), "plan.policy.streamed"), (_changed("terms.0", None), "terms"),
        (_changed("policy", 1), "plan.policy is 1"), (_changed("policy.states", {}), "plan.policy.states"),
    ],
)  # fmt: skip
def test_what_is_no_plan_is_refused(text: str, what: str) -> None:
    with pytest.raises(ValueError, match=re.escape(what)):
        Plan.from_json(text)


@given(plans)
def test_every_plan_has_a_table_of_limited_width(plan: Plan) -> None:
    assert all(len(line) <= 120 for line in str(plan).splitlines())


def test_table_shows_budget_prediction_schedule_and_chunks() -> None:
    lines = [" ".join(line.split()) for line in str(PLAN).splitlines()]
    assert lines[:7] == [
        "budget 1.0 GiB, predicted peak 512.0 MiB (50%) for a batch of 8x1024 tokens",
        "256.0 MiB weights and buffers",
        "256.0 MiB activations",
        "3 chunk(s), random order (seed 11), 3 steps each",
        "a sweep of 9 steps updates every weight 3 times",
        "3 chunks in turns of 3 can diverge where dense AdamW does not: so short ones are as a rule stable up to a "
        "rate of about",
        '2, dense steps up to 13 (docs/learning.md); interval="auto" takes 14 steps',
    ]
    assert lines[7:9] == [
        "regions from 2 on keep their activations, those before recompute them",
        "2 weights stay in host memory and pass through 2 buffers",
    ]
    assert lines[-3:] == [
        "0 embed.weight … 1 more … pos[:, 64:128 of 197] 1,234,567 5.0 MiB",
        "1 layers.0.up.weight[0:128 of 512], pos[:, 64:128 of 197] 99 300 B",
        "2 embed.weight 7 28 B",
    ]
    assert "\x1b" not in str(PLAN)


def test_table_before_a_batch_has_no_prediction() -> None:
    early = dataclasses.replace(PLAN, predicted_peak_bytes=None, terms=(), batch="", order="ascending")
    text = str(early)
    assert "not known before the first training batch" in text
    assert "keep their activations" not in text
    assert "seed" not in text


def test_long_plans_are_abbreviated() -> None:
    chunks = cut([ParameterSpec("w", (4096, 8), 14, 0)], 64)
    lines = str(Plan(2**30, chunks, "ascending", 1, 0)).splitlines()
    assert any("40 more chunks" in line for line in lines)
    assert len(lines) == 3 + 2 + 12 + 1 + 12
    assert "w[4032:4096 of 4096]" in lines[-1]

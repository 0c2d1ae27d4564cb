"""Plans: JSON round trips, what is refused as JSON, and the table."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkft_fx.errors import CheckpointMismatch
from chunkft_fx.plan.cuts import ParameterSpec, cut
from chunkft_fx.plan.plan import Chunk, Plan, Slice

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
    save_from=(2, 0, 1),
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
    save_from=st.lists(counts, min_size=4, max_size=4).map(tuple),
    predicted_peak_bytes=st.none() | counts,
    terms=st.lists(st.tuples(names, counts), max_size=4).map(tuple),
    batch=names,
)


@given(plans)
def test_json_gives_an_equal_plan_back(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


@given(plans)
def test_every_plan_has_a_table_of_limited_width(plan: Plan) -> None:
    assert all(len(line) <= 120 for line in str(plan).splitlines())


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{}", "not json", json.dumps({"chunks": []}), PLAN.to_json().replace("interval", "other")]
    + [PLAN.to_json().replace('"dim"', '"axis"')],
)
def test_other_text_is_not_a_plan(text: str) -> None:
    with pytest.raises(CheckpointMismatch, match=r"Plan\.to_json"):
        Plan.from_json(text)


def test_table_shows_budget_prediction_schedule_and_chunks() -> None:
    lines = [" ".join(line.split()) for line in str(PLAN).splitlines()]
    assert lines[:4] == [
        "budget 1.0 GiB, predicted peak 512.0 MiB (50%) for a batch of 8x1024 tokens",
        "256.0 MiB weights and buffers",
        "256.0 MiB activations",
        "3 chunk(s), random order (seed 11), 3 steps each",
    ]
    assert lines[-3:] == [
        "0 embed.weight … 1 more … pos[:, 64:128 of 197] 1,234,567 5.0 MiB from region 2",
        "1 layers.0.up.weight[0:128 of 512], pos[:, 64:128 of 197] 99 300 B from region 0",
        "2 embed.weight 7 28 B from region 1",
    ]
    assert "\x1b" not in str(PLAN)


def test_table_before_a_batch_has_no_prediction() -> None:
    early = dataclasses.replace(PLAN, save_from=(), predicted_peak_bytes=None, terms=(), batch="", order="ascending")
    text = str(early)
    assert "not known before the first training batch" in text
    assert "keeps activations" not in text
    assert "seed" not in text


def test_long_plans_are_abbreviated() -> None:
    chunks = cut([ParameterSpec("w", (4096, 8), 14, 0)], 64)
    lines = str(Plan(2**30, chunks, "ascending", 1, 0)).splitlines()
    assert any("40 more chunks" in line for line in lines)
    assert len(lines) == 2 + 2 + 12 + 1 + 12
    assert "w[4032:4096 of 4096]" in lines[-1]

"""Several ranks train what one process trains with their batches together: losses and weights, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.rank_runs import Case, in_turn, on_rank, trained
from tests.support.worlds import World

ONE, ALL = {"coverage": "one", "chunks": 3}, {"coverage": "all"}
CASES = {
    "one": Case(ONE),
    "one of many chunks": Case({"coverage": "one", "chunks": 12}),
    "one, clipped": Case(ONE, {"max_grad_norm": 0.05}),
    "one, accumulated": Case(ONE, micro_batches=3),
    "one, streamed": Case(ONE, is_streamed=True),
    "one, momentum": Case(ONE, {"momentum": 0.9}, "SGD"),
    "one, whole parameters": Case(ONE, kind="Adafactor"),
    "one, states begin anew": Case(ONE, {"states": "reset"}),
    "one, 8-bit states": Case(ONE, {"state_dtype": "8bit"}),
    "one, unused everywhere": Case(ONE, uses=(False, False, False)),
    "one, used by some": Case(ONE, uses=(False, True, False)),
    "one, uneven": Case(ONE, rows=(1, 2, 3)),
    "all": Case(ALL),
    "all, clipped": Case(ALL, {"max_grad_norm": 0.05}),
    "all, accumulated": Case(ALL, micro_batches=3),
    "all, streamed": Case(ALL, is_streamed=True),
    "all, in the backward": Case(ALL, {"update": "backward"}),
    "all, in the backward, accumulated": Case(ALL, {"update": "backward"}, micro_batches=3),
    "all, in the backward, streamed": Case(ALL, {"update": "backward"}, is_streamed=True),
    "all, late": Case(ALL, {"update": "late"}),
    "all, waiting": Case(ALL, waits=True),
    "all, waiting, clipped, accumulated": Case(ALL, {"max_grad_norm": 0.05}, micro_batches=3, waits=True),
    "all, waiting, copied": Case(ALL, waits=True, is_copied=True),
    "all, used by some": Case(ALL, uses=(False, True, False)),
    "all, uneven": Case(ALL, rows=(3, 1, 2)),
}


@pytest.fixture(scope="module", params=[2, 3])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    found = World(request.param)
    yield found
    found.close()


@pytest.mark.parametrize("name", CASES)
def test_ranks_train_what_one_process_trains(world: World, name: str) -> None:
    case = CASES[name]
    if case.rows:
        case = Case(**vars(case) | {"rows": {2: (2, 4), 3: case.rows}[world.size]})
    losses, weights = in_turn(case, world.size) if case.uses else trained(case)
    for others, theirs in world.run(on_rank, case):
        assert others == pytest.approx(losses, rel=1e-9, abs=1e-12)
        for key, weight in weights.items():
            assert (theirs[key] - weight).abs().max() <= 1e-9, key

"""Any order of what users do gives what the plain model and a reference loop give, or one clear error."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from chunkft_fx.errors import ChunkFTWarning
from tests.support.user_actions import ACTIONS, Run, new_run, train

# torch's own tracer looks at it on inputs that the caller computed
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

SEQUENCES = st.lists(st.sampled_from(ACTIONS), min_size=3, max_size=10)
QUIET = settings(max_examples=50, suppress_health_check=list(HealthCheck))


def follow(actions: list[object], chunks: int | str, order: str, interval: int, coverage: str = "one") -> Run:
    run = new_run(chunks, order, interval, coverage=coverage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ChunkFTWarning)
        for action in actions:
            assert callable(action)
            action(run)
            run.check()
        train(run)
        run.check()
    return run


@QUIET
@given(SEQUENCES, st.integers(1, 4), st.sampled_from(["ascending", "descending", "random"]), st.integers(1, 2))
def test_any_order_of_actions(actions: list[object], chunks: int, order: str, interval: int) -> None:
    follow(actions, chunks, order, interval)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_many_orders_of_actions(part: int) -> None:
    """500 sequences in ten parts that can run side by side, each of which draws the same ones every time."""

    @seed(part)
    @settings(QUIET, database=None)
    @given(
        st.lists(st.sampled_from(ACTIONS), min_size=5, max_size=20),
        st.integers(1, 6),
        st.sampled_from(["ascending", "descending", "random"]),
        st.integers(1, 3),
    )
    def sequences(actions: list[object], chunks: int, order: str, interval: int) -> None:
        follow(actions, chunks, order, interval)

    sequences()


@pytest.mark.parametrize("action", dict.fromkeys(ACTIONS), ids=lambda a: a.__name__)
def test_each_action_before_and_after_the_first_step(action: object) -> None:
    follow([action, train, action, train], 2, "ascending", 1)


@pytest.mark.parametrize("action", dict.fromkeys(ACTIONS), ids=lambda a: a.__name__)
def test_each_action_with_full_coverage(action: object) -> None:
    follow([action, train, action, train], "auto", "ascending", 1, "all")


@pytest.mark.slow
@settings(QUIET, database=None)
@given(st.lists(st.sampled_from(ACTIONS), min_size=5, max_size=20))
def test_many_orders_of_actions_with_full_coverage(actions: list[object]) -> None:
    follow(actions, "auto", "ascending", 1, "all")

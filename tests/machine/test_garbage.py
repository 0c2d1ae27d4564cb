"""The collector's thresholds while graphs are made, and after."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Literal

import pytest

import chunkft_fx
from chunkft_fx.machine.garbage import COLLECTOR, SELDOM
from chunkft_fx.tools.zoo import tiny


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def test_thresholds_are_raised_inside_and_put_back_also_after_an_error() -> None:
    gc.set_threshold(700, 10, 10)
    with pytest.raises(RuntimeError, match="inside"), COLLECTOR.seldom():
        assert gc.get_threshold() == SELDOM
        raise RuntimeError("inside")
    assert gc.get_threshold() == (700, 10, 10)


@pytest.mark.parametrize("own", [(0, 10, 10), (10**6, 50, 200)])
def test_what_the_user_set_higher_or_turned_off_stays(own: tuple[int, int, int]) -> None:
    gc.set_threshold(*own)
    with COLLECTOR.seldom():
        assert gc.get_threshold() == own
    assert gc.get_threshold() == own


def test_what_someone_sets_meanwhile_stays() -> None:
    gc.set_threshold(700, 10, 10)
    with COLLECTOR.seldom():
        gc.set_threshold(900, 5, 5)
    assert gc.get_threshold() == (900, 5, 5)


def test_the_last_of_several_threads_puts_them_back() -> None:
    gc.set_threshold(700, 10, 10)
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with COLLECTOR.seldom():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with COLLECTOR.seldom():
        thread.start()
        assert entered.wait(10)
    assert gc.get_threshold() == SELDOM
    leave.set()
    thread.join()
    assert gc.get_threshold() == (700, 10, 10)


def test_a_model_is_traced_and_planned_with_raised_thresholds() -> None:
    gc.set_threshold(700, 10, 10)
    model, batch = tiny("llama")
    seen: list[tuple[int, int, int]] = []
    compiled = chunkft_fx.compile(model, 10**12, chunks=1, backend="eager", region_passes=[Looks(seen)])
    compiled(**batch(2, 16, 0))
    assert seen
    assert set(seen) == {SELDOM}
    assert gc.get_threshold() == (700, 10, 10)
    compiled(**batch(2, 16, 0))
    assert gc.get_threshold() == (700, 10, 10)


class Looks:
    """A pass that notes the thresholds while it runs."""

    name = "looks"
    numerics: Literal["bitwise", "reassociated"] = "bitwise"

    def __init__(self, seen: list[tuple[int, int, int]]) -> None:
        self._seen = seen

    def __call__(self, region: object) -> int:
        self._seen.append(gc.get_threshold())
        return 0

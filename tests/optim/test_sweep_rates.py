"""The rates of a sweep by themselves: what each chunk's updates use of the rates that are set step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from chunkft_fx.errors import CheckpointMismatch, OptionError
from chunkft_fx.optim.sweep_rates import SweepRates, turn
from chunkft_fx.plan.schedule import ORDERS, SAFE_SHARE, WARMUP_UPDATES, ChunkSchedule, interval_of

PEAK = 0.3
SCHEDULES = [get_linear_schedule_with_warmup, get_cosine_schedule_with_warmup]
RATES = st.floats(0, 10, allow_subnormal=False)


@dataclass
class Used:
    """What became of a run: the rates that updates used, in order and by chunk, and those that took a chunk's turn."""

    rates: list[float] = field(default_factory=list)
    by_chunk: list[list[float]] = field(default_factory=list)
    turns: list[list[float]] = field(default_factory=list)

    @property
    def sums(self) -> list[float]:
        return [math.fsum(rates) for rates in self.by_chunk]

    @property
    def spread(self) -> float:
        """By how much of the largest the sums of chunks differ."""
        return (max(self.sums) - min(self.sums)) / max(self.sums)


def run(
    rates: Sequence[float], schedule: ChunkSchedule, by: str = "sweep", initial: float = PEAK, size: float = 0.0
) -> Used:
    """A run in which these rates are set, one after the other, by a scheduler whose own rate is ``initial``.

    Weights have the root mean square ``size``.
    """
    chunks = range(schedule.chunks)
    used, known = Used(by_chunk=[[] for _ in chunks], turns=[[] for _ in chunks]), SweepRates()
    for rate in rates:
        weights = [torch.full((3,), size)]
        taken = turn(by, known, [{"lr": rate, "initial_lr": initial, "params": weights}], schedule)
        known = taken.after
        used.rates.append(rate if taken.rates is None else taken.rates[0])
        used.by_chunk[schedule.chunk].append(used.rates[-1])
        if taken.takes_turn:
            used.turns[schedule.chunk].append(used.rates[-1])
            schedule.advance()
    return used


def scheduled(make: Callable[..., LRScheduler], warmup: int, steps: int) -> Iterator[float]:
    """The rates that a scheduler sets from step to step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = make(optimizer, warmup, steps)
    for _ in range(steps):
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


@settings(max_examples=60)
@given(
    make=st.sampled_from(SCHEDULES),
    chunks=st.integers(1, 16),
    interval=st.integers(1, 7),
    order=st.sampled_from(ORDERS),
    sweeps=st.integers(8, 12),
    more=st.floats(0, 1, exclude_max=True),
    warmup=st.floats(0, 0.3),
    seed=st.integers(0, 9),
)
def test_sums_of_chunks_differ_by_less_than_5_percent(
    make: Callable[..., LRScheduler],
    chunks: int,
    interval: int,
    order: str,
    sweeps: int,
    more: float,
    warmup: float,
    seed: int,
) -> None:
    """From 8 sweeps on, wherever in a sweep a run ends: the rate is then so low that a turn more is little."""
    steps = int((sweeps + more) * chunks * interval)
    used = run(list(scheduled(make, int(warmup * steps), steps)), ChunkSchedule(chunks, order, interval, seed))
    assert used.spread < 0.05
    assert chunks == 1 or all(rate > 0 for turns in used.turns for rate in turns)


@settings(max_examples=60)
@given(
    make=st.sampled_from(SCHEDULES),
    chunks=st.integers(2, 70),
    order=st.sampled_from(ORDERS),
    many=st.integers(0, 4),
    more=st.floats(0, 1, exclude_max=True),
    warmup=st.floats(0, 0.3),
    size=st.sampled_from([0.0, 0.1, 1.0, 3.0, PEAK / SAFE_SHARE, 100.0]),
)
def test_sums_differ_by_less_than_5_percent_where_chunks_warm_up(
    make: Callable[..., LRScheduler], chunks: int, order: str, many: int, more: float, warmup: float, size: float
) -> None:
    """From 8 sweeps on where all rates are safe, and in any case from 16 on."""
    schedule = ChunkSchedule(chunks, order, interval_of("auto", chunks), warms_up=True)
    sweeps = many + (8 if size * SAFE_SHARE >= PEAK else 16)
    steps = chunks + int((sweeps - 1 + more) * chunks * schedule.interval)
    assert run(list(scheduled(make, int(warmup * steps), steps)), schedule, size=size).spread < 0.05


@given(rate=RATES, chunks=st.integers(2, 5), interval=st.integers(1, 9), order=st.sampled_from(ORDERS))
def test_chunks_warm_up_over_their_own_first_updates(rate: float, chunks: int, interval: int, order: str) -> None:
    schedule = ChunkSchedule(chunks, order, interval, warms_up=True)
    used = run([rate] * chunks * (1 + 3 * interval), schedule, initial=0)
    for rates in used.by_chunk:
        shares = [min(1.0, (update + 1) / WARMUP_UPDATES) for update in range(1 + 3 * interval)]
        assert rates == pytest.approx([rate * share for share in shares], rel=1e-12)


@pytest.mark.parametrize("weights", [[torch.tensor([3.0, 4.0, 0.0])], [torch.tensor([5.0]), torch.zeros(2).bfloat16()]])
def test_rates_that_are_small_beside_the_weights_need_no_warm_up(weights: list[torch.Tensor]) -> None:
    size = math.sqrt(25 / 3)
    for rate in (0.01, SAFE_SHARE * size, 0.2, 10.0):
        schedule, known = ChunkSchedule(2, interval=20, warms_up=True), SweepRates()
        used: list[float] = []
        for _ in range(22):
            taken = turn("sweep", known, [{"lr": rate, "params": weights}], schedule)
            known = taken.after
            used += taken.rates or ()
            schedule.advance()
        rising = [max(rate * min(1, n / WARMUP_UPDATES), min(rate, SAFE_SHARE * size)) for n in range(1, 22)]
        assert used == pytest.approx([rising[0], *rising])


def test_by_step_chunks_do_not_warm_up() -> None:
    assert run([1.0] * 9, ChunkSchedule(3, interval=2, warms_up=True), by="step").rates == [1.0] * 9


def test_other_chunks_go_on_where_the_least_updated_one_was() -> None:
    schedule, known = ChunkSchedule(2, interval=4, warms_up=True), SweepRates()
    for _ in range(7):  # one each, then 4 and 1
        known = turn("sweep", known, [{"lr": 1.0}], schedule).after
        schedule.advance()
    assert known.updates == (5, 2)
    assert turn("sweep", known, [{"lr": 1.0}], ChunkSchedule(3, warms_up=True)).rates == (3 / WARMUP_UPDATES,)


@pytest.mark.parametrize("make", SCHEDULES)
def test_by_step_sums_differ_by_a_sixth_and_more(make: Callable[..., LRScheduler]) -> None:
    """So that the property above can fail, and the reason why the sweep is the default."""
    rates = list(scheduled(make, 10, 540))
    assert run(rates, ChunkSchedule(64), by="step").spread > 0.16
    assert run(rates, ChunkSchedule(64), by="step").by_chunk[0][0] == 0


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("warmup", [1, 20, 64, 100])
def test_over_whole_sweeps_sums_are_equal(make: Callable[..., LRScheduler], warmup: int) -> None:
    """One step more, for the first, which is at 0 and takes no turn."""
    used = run(list(scheduled(make, warmup, 64 * 10 + 1)), ChunkSchedule(64))
    assert used.spread < 1e-12
    assert [len(turns) for turns in used.by_chunk] == [11] + [10] * 63


def test_what_all_chunks_use_is_what_was_set() -> None:
    """Rates that are held from the first step of a sweep are a left sum, of a schedule that begins and ends at 0."""
    for make in SCHEDULES:
        rates = list(scheduled(make, 100, 1000))
        assert sum(run(rates, ChunkSchedule(50)).rates) == pytest.approx(sum(rates), rel=0.03)


@given(
    rates=st.lists(RATES, min_size=1, max_size=60),
    chunks=st.integers(2, 5),
    interval=st.integers(1, 3),
    order=st.sampled_from(ORDERS),
)
def test_no_update_uses_more_than_was_ever_set(rates: list[float], chunks: int, interval: int, order: str) -> None:
    used = run(rates, ChunkSchedule(chunks, order, interval), initial=0)
    for step, (rate, was_set) in enumerate(zip(used.rates, rates, strict=True)):
        assert 0 <= rate <= max(rates[: step + 1])
        assert rate == 0 or was_set > 0
    first = chunks * interval
    assert used.rates[:first] == rates[:first]


@given(rate=RATES, chunks=st.integers(2, 9), interval=st.integers(1, 4), order=st.sampled_from(ORDERS))
def test_a_constant_rate_is_used_to_the_bit(rate: float, chunks: int, interval: int, order: str) -> None:
    assert run([rate] * 50, ChunkSchedule(chunks, order, interval), initial=0).rates == [rate] * 50


def test_a_rate_is_held_for_a_sweep_and_a_drop_acts_at_the_next() -> None:
    rates = [1.0] * 8 + [1.0, 0.1, 0.1, 0.1] + [0.1] * 4
    assert run(rates, ChunkSchedule(4)).rates == [1.0] * 12 + [0.1] * 4


def test_what_the_first_sweep_lacked_is_made_up_below_the_highest_rate() -> None:
    """A warm-up within the first sweep, the last turn of which was above its mean; then a rate that falls."""
    used = run([0.25, 0.5, 0.75, 1.0] + [0.8] * 4 + [0.6] * 4 + [0.4] * 4, ChunkSchedule(4))
    assert used.by_chunk[0] == pytest.approx([0.25, 1.0, 0.775, 0.4])
    assert used.by_chunk[3] == pytest.approx([1.0, 0.425, 0.6, 0.4])
    assert used.sums == pytest.approx([2.425] * 4)


def test_what_is_made_up_is_from_half_to_twice_the_rate_held() -> None:
    """A rate that was lowered because training went wrong does not come back whole for one chunk, nor stop another."""
    used = run([0.01, 1.0] + [0.1] * 6, ChunkSchedule(2))
    assert used.by_chunk == [[0.01] + [0.2] * 3, [1.0] + [0.05] * 3]


def test_a_rate_of_0_acts_at_once_and_is_not_held() -> None:
    used = run([1.0] * 5 + [0.0, 0.0] + [0.5] * 5, ChunkSchedule(4), initial=0)
    assert used.rates == [1.0] * 5 + [0.0, 0.0] + [1.0] + [0.5] * 4
    assert run([1.0] * 4 + [0.0, 0.5, 0.5], ChunkSchedule(4), initial=0).rates[4:] == [0.0, 0.5, 0.5]


def test_only_a_schedule_that_is_at_0_takes_no_turn() -> None:
    schedule = ChunkSchedule(4)
    run([0.0, 0.0], schedule, initial=PEAK)
    assert schedule.chunk == 0
    run([0.0, 0.0], schedule, initial=0)
    assert schedule.chunk == 2


def test_a_chunk_that_is_chosen_by_hand_gets_the_rate_that_is_set() -> None:
    """A sweep that never ends holds no rate for longer than a sweep takes."""
    schedule, known = ChunkSchedule(3), SweepRates()
    used: list[float] = []
    for step in range(12):
        schedule.activate(1 if step > 3 else step % 3)
        taken = turn("sweep", known, [{"lr": 1.0 + step}], schedule)
        known = taken.after
        used += taken.rates or ()
        schedule.advance()
    assert used[:3] == [1.0, 2.0, 3.0]
    assert used[6:] == [7.0] * 3 + [10.0] * 3


def test_other_chunks_or_groups_begin_anew() -> None:
    schedule, known = ChunkSchedule(2), SweepRates()
    for _ in range(4):
        known = turn("sweep", known, [{"lr": 1.0}], schedule).after
        schedule.advance()
    assert turn("sweep", known, [{"lr": 0.5}], ChunkSchedule(3)).rates == (0.5,)
    assert turn("sweep", known, [{"lr": 0.5}], ChunkSchedule(3)).after.is_first
    assert turn("sweep", known, [{"lr": 0.5}] * 2, ChunkSchedule(2)).after.is_first


@pytest.mark.parametrize("by", ["sweep", "step"])
def test_one_chunk_uses_what_its_group_says(by: str) -> None:
    taken = turn(by, SweepRates(), [{"lr": 0.0, "initial_lr": 1.0}], ChunkSchedule(1, interval=5))
    assert (taken.rates, taken.takes_turn) == (None, True)


def test_a_rate_out_of_range_is_refused() -> None:
    """One on a GPU is looked at here alone."""
    with pytest.raises(OptionError, match=r"lr=nan must be a number, 0 or more"):
        turn("sweep", SweepRates(), [{"lr": torch.tensor(math.nan)}], ChunkSchedule(2))


@given(rates=st.lists(RATES, max_size=20), chunks=st.integers(2, 4))
def test_what_is_saved_is_what_is_read(rates: list[float], chunks: int) -> None:
    schedule, known = ChunkSchedule(chunks, warms_up=True), SweepRates()
    for rate in rates:
        known = turn("sweep", known, [{"lr": rate}, {"lr": 2 * rate}], schedule).after
        schedule.advance()
    assert SweepRates.read(known.state_dict()) == known


@pytest.mark.parametrize(
    "change",
    [
        {"groups": None},
        {"groups": [{"held": 1.0}]},
        {"turns": ["a", "b"]},
        {"chunks": 3},
        {"turns": [1]},
        {"updates": [1]},
    ],
)
def test_rates_that_are_none_are_refused(change: dict[str, object]) -> None:
    state = turn("sweep", SweepRates(), [{"lr": 1.0}], ChunkSchedule(2)).after.state_dict()
    assert state is not None
    with pytest.raises(CheckpointMismatch, match="checkpoint"):
        SweepRates.read(state | change)

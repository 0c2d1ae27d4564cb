"""The parts of the benchmark of updates on the host that need no GPU: its update, and what it derives from rates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.bench_host_update import (
    HOST_NBYTES,
    STATE_NBYTES,
    HostUpdate,
    Row,
    elements_per_second,
    outlook,
    table,
    thread_counts,
)


def zeros(nbytes: int) -> Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8)


@pytest.mark.parametrize(
    "piece", [16, 64, 1000]
)  # multiples of what torch computes at once, as rates are measured with
def test_the_host_updates_as_torchs_adamw_does(piece: int) -> None:
    update = HostUpdate(200, zeros)
    parameter = torch.nn.Parameter(update.masters.clone())
    optimizer = torch.optim.AdamW([parameter], lr=1e-5, weight_decay=0.01, fused=True)
    for _ in range(3):
        update.gradients.normal_()
        parameter.grad = update.gradients.float()
        optimizer.step()
        update.run(piece)
    assert torch.equal(update.masters, parameter)
    assert torch.equal(update.weights, parameter.bfloat16())
    assert torch.equal(update.exp_avg_sq, optimizer.state[parameter]["exp_avg_sq"])


def test_the_rate_counts_whole_steps() -> None:
    update = HostUpdate(1000, zeros)
    assert elements_per_second(update, 300, seconds=0.01) > 0
    assert update.step > 1


RATES = st.floats(1e7, 1e12)


@given(RATES, RATES, st.floats(0.2, 1.0), st.floats(0, 1))
def test_no_other_share_takes_less(host: float, link_alone: float, left: float, other: float) -> None:
    link, parameters = link_alone * left, 1e9
    best = outlook(parameters, host, link, link_alone)
    assert 0 <= best.share <= 1
    on_link = other * HOST_NBYTES + (1 - other) * STATE_NBYTES
    taken = parameters * max(other / host, on_link / link)
    assert best.seconds <= taken * (1 + 1e-9)
    assert best.seconds <= best.without == parameters * STATE_NBYTES / link_alone


def test_a_host_that_slows_the_link_down_too_much_has_no_share() -> None:
    assert outlook(1e9, host=1e8, link=2e10, link_alone=5e10).share == 0
    assert 0 < outlook(1e9, host=1e9, link=4.9e10, link_alone=5e10).share < 1
    assert outlook(1e9, host=1e12, link=5e10, link_alone=5e10).share == 1


def test_the_table_has_a_row_for_each_measurement() -> None:
    rows = [Row(16, 2**20, 3e9, 2e9, 40 * 2**30), Row(4, 2**22, 1e9, 1e9, 45 * 2**30)]
    lines = table(rows, 6.74e9, 46 * 2**30, 9900).splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert lines[3].startswith("| 16 | 1 Mi | 3.00e9/s | 2.00e9/s | 40.0 GiB/s | 0.339 |")


def test_all_half_and_a_quarter_of_the_threads_are_measured() -> None:
    assert thread_counts(16) == [16, 8, 4]
    assert thread_counts(2) == [2, 1]

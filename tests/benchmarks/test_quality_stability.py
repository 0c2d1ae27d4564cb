"""Up to which rate turns mend a shared error: the modes of the formula, a simulation on weights, and both limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quality.stability import HIGHEST, dense, growth, kept, restarted, threshold
from chunkft_fx.plan.schedule import TURNS_LIMIT, interval_of, short_turns

BETAS = st.floats(0.1, 0.98)
EVEN = st.integers(1, 12).map(lambda n: 2 * n)


def trained(
    chunks: int, interval: int, beta1: float, rate: float, turns: int, momenta: str = "keep", together: bool = False
) -> list[float]:
    """The error after each turn of Adam's first moments on the weights themselves, from an error of 1 on."""
    weights, moments, steps = np.zeros(chunks), np.zeros(chunks), np.zeros(chunks)
    weights[0] = 1.0
    errors = []
    for turn in range(turns):
        active = slice(None) if together else turn % chunks
        if momenta == "restart":
            moments[active] = steps[active] = 0
        for _ in range(interval):
            steps[active] += 1
            moments[active] = beta1 * moments[active] + (1 - beta1) * weights.sum()
            corrected = moments[active] / (1 - beta1 ** steps[active]) if momenta == "restart" else moments[active]
            weights[active] -= rate * corrected
        errors.append(float(weights.sum()))
    return errors


@given(chunks=st.integers(1, 12), beta1=BETAS, rate=st.floats(0.05, 40))
def test_the_modes_of_turns_of_one_step_are_the_roots_of_the_formula(chunks: int, beta1: float, rate: float) -> None:
    formula = np.zeros(chunks + 2)  # (z - 1) (z^n - beta1) + rate (1 - beta1) z^n, from the highest power on
    formula[:2] = 1, rate * (1 - beta1) - 1
    formula[-2:] += -beta1, beta1
    matrix = np.poly(kept(chunks, 1, beta1, rate))
    np.testing.assert_allclose(matrix, formula, rtol=0, atol=1e-9 * max(1, rate))


@given(chunks=st.integers(1, 6), interval=st.integers(1, 6), beta1=BETAS, rate=st.floats(0.05, 4))
def test_matrix_and_factor_of_a_turn_are_what_weights_do(chunks: int, interval: int, beta1: float, rate: float) -> None:
    state = np.zeros(chunks + 1)
    state[0] = 1.0
    expected, factors = [], []
    for turn in range(5):
        state = kept(chunks, interval, beta1, rate) @ state
        expected.append(state[0])
        factors.append(restarted(interval, beta1, rate) ** (turn + 1))
    np.testing.assert_allclose(trained(chunks, interval, beta1, rate, 5), expected, rtol=1e-9, atol=1e-9)
    begun_anew = trained(chunks, interval, beta1, rate, 5, "restart")
    np.testing.assert_allclose(begun_anew, factors, rtol=1e-9, atol=1e-9)


@settings(max_examples=30)
@given(chunks=EVEN, beta1=BETAS)
def test_turns_of_one_step_are_stable_up_to_a_rate_of_2_whatever_beta1_is(chunks: int, beta1: float) -> None:
    assert all(growth(chunks, 1, beta1, share * 2, "keep") < 1 for share in (0.1, 0.5, 0.9, 0.999))
    assert growth(chunks, 1, beta1, 2, "keep") == pytest.approx(1, abs=1e-6)
    assert growth(chunks, 1, beta1, 2.02, "keep") > 1


@settings(max_examples=30)
@given(chunks=st.integers(1, 24), beta1=BETAS, rate=st.floats(0.01, 1.999))
def test_no_number_of_chunks_is_less_stable(chunks: int, beta1: float, rate: float) -> None:
    assert growth(chunks, 1, beta1, rate, "keep") < 1
    assert growth(chunks, 1, beta1, rate, "restart") < 1


@pytest.mark.parametrize("chunks", [1, 2, 4, 8, 16])
def test_dense_is_stable_up_to_its_own_threshold(chunks: int) -> None:
    def last(rate: float) -> float:
        return abs(trained(chunks, 1, 0.9, rate, 200, together=True)[-1])

    assert dense(chunks, 0.9) == pytest.approx(38 / chunks)
    assert last(0.98 * dense(chunks, 0.9)) < 1e-3
    assert last(1.02 * dense(chunks, 0.9)) > 1e3


def test_intervals_give_back_what_turns_of_one_step_lose_if_moments_are_kept() -> None:
    found = {k: threshold(2, k, 0.9, "keep") for k in (1, 2, 20)}
    assert found[1] == pytest.approx(2, rel=1e-4)
    assert found[2] == pytest.approx(2.13, abs=0.01)
    assert found[20] > dense(2, 0.9)
    assert threshold(2, 20, 0.9, "restart") == pytest.approx(5.43, abs=0.01)
    assert threshold(1, 1, 0.9, "keep") == pytest.approx(dense(1, 0.9), rel=1e-4)
    assert dense(1, 0.98) > HIGHEST == threshold(1, 1, 0.98, "keep")


@pytest.mark.parametrize("chunks", [2, 3, 5, 8, 13, 16, 24, 40, 64])
def test_sweeps_of_40_steps_are_as_stable_as_dense_steps(chunks: int) -> None:
    assert threshold(chunks, -(-40 // chunks), 0.9, "keep") > dense(chunks, 0.9)


@pytest.mark.parametrize("chunks", range(2, 25))
def test_turns_that_the_library_warns_of_are_less_stable_than_dense_steps_and_its_own_are_about_as_stable(
    chunks: int,
) -> None:
    usual = interval_of("auto", chunks)
    for interval in range(1, usual):
        if short_turns(chunks, interval):
            limit = threshold(chunks, interval, 0.9, "keep")
            assert limit < dense(chunks, 0.9)
            assert (chunks, interval) == (3, 3) or TURNS_LIMIT - 0.01 < limit < TURNS_LIMIT + 0.9
    assert not short_turns(chunks, usual)
    assert threshold(chunks, usual, 0.9, "keep") > 0.9 * dense(chunks, 0.9)


def test_turns_of_one_step_are_warned_of_where_they_lose_a_fifth_or_more() -> None:
    warned = {chunks for chunks in range(2, 65) if short_turns(chunks, 1)}
    assert warned == {chunks for chunks in range(2, 65) if dense(chunks, 0.9) > 2.5}

"""Predictions of a captured model: times of its regions, and what a chunk adds to a step."""

from __future__ import annotations

import pytest

import chunkft_fx
from chunkft_fx.graph.sizes import AS_TRACED
from chunkft_fx.machine.rates import Rates
from chunkft_fx.plan.cuts import cut
from chunkft_fx.plan.policy import Policy
from chunkft_fx.planning.planner import parameter_specs
from chunkft_fx.predict.predictor import Predictor
from chunkft_fx.predict.region.time import direction_us
from chunkft_fx.predict.step_memory import step_timeline
from chunkft_fx.runtime.session import Session
from chunkft_fx.tools.zoo import tiny

# Round figures: what is predicted with them is compared with itself.
RATES = Rates({"float32": 1e12}, 1e11, 1e10, 2e10, 5e9, 3.0)


def test_regions_get_times_where_rates_are_known() -> None:
    model, batch = tiny("llama")
    compiled = chunkft_fx.compile(model, "8GB", chunks=3, interval=1, backend="eager")
    compiled(**batch(2, 16, 0))
    session = compiled._training.sessions[-1]
    (whole,) = cut(parameter_specs(model), 1)
    assert Predictor(session.programs).times(whole) is None
    predictor = Predictor(session.programs, known=RATES)
    times = predictor.times(whole)
    assert times is not None
    regions = len(predictor.uses())
    for each in (
        times.forward_us,
        times.backward_us,
        times.recompute_us,
        times.gradients_us,
        times.fetch_us,
        times.offload_us,
    ):
        assert len(each) == regions
        assert all(us >= 0 for us in each)
    assert min(times.forward_us) > 0
    # equal blocks share their variants, so their times; what comes first is kept for nobody
    assert len({times.forward_us[i] for i in range(1, regions - 1)}) == 1
    assert times.offload_us[0] == 0
    assert min(times.offload_us[1:]) > 0
    parameters = dict(model.named_parameters())
    weights = sum(p.numel() * p.itemsize for p in parameters.values())
    assert sum(times.fetch_us) == pytest.approx(weights / RATES.host_to_device_nbytes_per_s * 1e6)
    works = [predictor.work(c, times, c.nbytes) for c in compiled.plan.chunks]
    together = predictor.work(whole, times, whole.nbytes)
    assert sum(w.gradients_us for w in works) == pytest.approx(together.gradients_us)
    assert sum(w.states_us for w in works) == pytest.approx(together.states_us)
    assert together.lowest == works[0].lowest == 0
    assert [w.lowest for w in works] == sorted(w.lowest for w in works)


def test_gradients_of_the_chunk_that_times_are_told_by_are_not_counted_twice() -> None:
    model, batch = tiny("llama")
    compiled = chunkft_fx.compile(model, "8GB", chunks=1, backend="eager")
    compiled(**batch(2, 16, 0))
    programs = compiled._training.sessions[-1].programs
    (whole,) = compiled.plan.chunks
    predictor = Predictor(programs, known=RATES)
    times = predictor.times(whole)
    assert times is not None
    variants = programs.planned(whole, frozenset(), Policy()).program.variants
    # a region whose backward takes less than its forward, such as an embedding, counts as its forward
    each = [max(direction_us(v, True, RATES, AS_TRACED), direction_us(v, False, RATES, AS_TRACED)) for v in variants]
    both = [b + g for b, g in zip(times.backward_us, times.gradients_us, strict=True)]
    assert both == pytest.approx(each)


def absent(session: Session) -> frozenset[str]:
    """The tangents that backward is not expected to get: those of outputs that are no loss."""
    return frozenset(session.capture.tangents) - session._expected


def test_micro_batches_take_their_number_of_times_what_each_of_them_does() -> None:
    model, batch = tiny("llama")
    compiled = chunkft_fx.compile(model, "8GB", chunks=1, backend="eager")
    compiled(**batch(2, 16, 0))
    programs = compiled._training.sessions[-1].programs
    (whole,) = cut(parameter_specs(model), 1)
    one, four = (Predictor(programs, known=RATES, micro_batches=n).times(whole) for n in (1, 4))
    assert one is not None
    assert four is not None
    for name in ("forward_us", "backward_us", "recompute_us", "gradients_us", "offload_us"):
        assert getattr(four, name) == pytest.approx([4 * us for us in getattr(one, name)])
    assert [us for _, us in four.split_us] == pytest.approx([4 * us for _, us in one.split_us])
    assert (four.fetch_us, four.state_us_per_byte) == (one.fetch_us, one.state_us_per_byte)
    assert four.times(1 / 4).forward_us == pytest.approx(one.forward_us)
    # the sums: three times a bfloat16 gradient, and a float32 total read and written
    assert four.update_us_per_element - one.update_us_per_element == pytest.approx(30 / 1e11 * 1e6)


def test_the_timeline_of_a_step_holds_its_peak() -> None:
    model, batch = tiny("llama")
    compiled = chunkft_fx.compile(model, "8GB", chunks=3, interval=1, backend="eager")
    compiled(**batch(2, 16, 0))
    session = compiled._training.sessions[-1]
    given = {"batch": 1000}
    predictor = Predictor(session.programs, absent(session), given=given)
    regions = len(predictor.uses())
    for saving in (Policy(0), Policy(regions)):
        moments = step_timeline(session.programs.planned(compiled.plan.chunks[0], absent(session), saving), "eager")
        peak = predictor.peak(compiled.plan.chunks[0], saving)
        assert peak.label in {m.label for m in moments}
        assert peak.nbytes == max(m.nbytes for m in moments) + sum(given.values())
    first = session.programs.planned(compiled.plan.chunks[0], absent(session), Policy())
    assert compiled.timeline == step_timeline(first, "eager")


@pytest.mark.parametrize("family", ["llama", "gpt2", "cnn"])
def test_a_step_that_looks_like_a_known_one_has_its_own_moments(family: str) -> None:
    """Exchanged variants predict what a program written for the chunk predicts, and some programs are shared."""
    model, batch = tiny(family)
    compiled = chunkft_fx.compile(model, "8GB", chunks=3, interval=1, backend="eager")
    compiled(**batch(2, 16, 0))
    programs, unexpected = compiled._training.sessions[-1].programs, absent(compiled._training.sessions[-1])
    asked = 0
    for count in (3, 40, 60):
        chunks = cut(parameter_specs(model), count)
        for chunk in (chunks[0], chunks[1], chunks[count // 2]):
            for policy in (Policy(), Policy(2, 2)):
                asked += 1
                exchanged = programs.planned(chunk, unexpected, policy)
                known, programs._planned = programs._planned, {}
                written = programs.planned(chunk, unexpected, policy)
                programs._planned = known
                assert step_timeline(exchanged, "eager") == step_timeline(written, "eager")
                assert exchanged.program.variants == written.program.variants
    assert len(programs._planned) < asked

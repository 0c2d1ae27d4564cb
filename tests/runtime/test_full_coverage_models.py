"""Random models, all parameters in every step, in any mixture of what training loops do: torch's AdamW to 1e-9."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.support import random_model
from tests.support.full_coverage import UPDATES, Loop, difference, of_the_plain_model, with_full_coverage
from tests.support.random_model import RandomModel

TOLERANCE = 1e-9  # of each element of parameters and buffers, absolute below 1 and relative above
# Without shrinking, which would train hundreds of models to tell of a smaller one.
PHASES = [p for p in Phase if p not in (Phase.shrink, Phase.explain)]
QUIET = settings(suppress_health_check=list(HealthCheck), database=None, phases=PHASES)
SIZES = st.tuples(st.integers(1, 3), st.integers(2, 6))


@st.composite
def loops(draw: st.DrawFn, model: RandomModel, update: str) -> Loop:
    """A loop of ten steps in which at least the embedding is trained."""
    names = [n for n, _ in model.named_parameters()]
    frozen = draw(st.lists(st.sampled_from(names[1:]), max_size=3, unique=True))
    trained = [n for n in names if n not in frozen]
    return Loop(
        update,
        micro=draw(st.integers(1, 3)),
        clip=draw(st.sampled_from([None, 0.05])) if update == "step" else None,
        no_decay=tuple(draw(st.lists(st.sampled_from(trained), max_size=4, unique=True))),
        frozen=tuple(frozen),
        streamed=draw(st.sampled_from(["", "all", "mixed"])),
        piece=draw(st.sampled_from([0, 300, 2000])),
    )


def train_both(data: st.DataObject, update: str) -> None:
    model = RandomModel(data.draw(random_model.specs()))
    loop = data.draw(loops(model, update))
    sizes = data.draw(st.lists(SIZES, min_size=1, max_size=2))
    batches = random_model.batches(data.draw(st.integers(0, 99)), sizes, data.draw(st.lists(st.booleans(), min_size=1)))
    expected = of_the_plain_model(model, loop, batches, lambda loss: loss)
    error, name = difference(with_full_coverage(model, loop, batches, lambda loss: loss), expected)
    assert error <= TOLERANCE, f"{name} differs by {error:.1e}"


@pytest.mark.parametrize("update", UPDATES)
@settings(QUIET, max_examples=4)
@given(data=st.data())
def test_random_models(update: str, data: st.DataObject) -> None:
    train_both(data, update)


@pytest.mark.slow
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("part", range(5))
def test_many_random_models(part: int, update: str) -> None:
    """300 models in ten parts that can run side by side, each of which draws the same ones every time."""

    @seed(part)
    @settings(QUIET, max_examples=30)
    @given(data=st.data())
    def models(data: st.DataObject) -> None:
        train_both(data, update)

    models()

"""The memory of a step whose gradients leave for host memory: those of two backward calls at most are there at once."""

from __future__ import annotations

import torch

import chunkft_fx
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.predict.step_memory import GRADIENTS, SAVED, Moment
from tests.planning.test_gradient_place import Layers
from tests.support.waiting import waiting_in_host

# Bytes of one layer's gradient; the smallest activation is 128 times smaller.
LAYER = 128 * 128 * 4


def timeline() -> tuple[Moment, ...]:
    model = chunkft_fx.compile(Layers(), "1GB", coverage="all", backend="eager")
    assert isinstance(model, CompiledModule)
    model(torch.ones(2, 128)).backward()
    return model.timeline


def test_gradients_are_gone_one_backward_call_later() -> None:
    on_device = timeline()
    with waiting_in_host():
        waiting = timeline()
    assert [m.label for m in on_device] == [m.label for m in waiting]
    assert max(m.terms[GRADIENTS] for m in on_device) >= 5 * LAYER
    assert all(m.terms[GRADIENTS] == 0 for m in waiting)
    more = [(a.terms[SAVED] - b.terms[SAVED]) // LAYER for a, b in zip(waiting, on_device, strict=True)]
    assert max(more) == 1  # of the layer before, while it may still be on its way into the ring
    assert all(extra in (0, 1) for extra in more)

"""Every family of the zoo, all parameters in every step: ten steps are those of torch's AdamW on the plain model."""

from __future__ import annotations

import copy

import pytest
import torch

import chunkft_fx
from chunkft_fx.tools.zoo import FAMILIES, tiny
from tests.support.waiting import waiting_in_host


@pytest.mark.slow
@pytest.mark.parametrize("family", list(FAMILIES))
def test_ten_steps_of_a_family_with_gradients_in_host_memory(family: str) -> None:
    with waiting_in_host(is_copied=True):
        test_ten_steps_of_a_family(family, "step")


@pytest.mark.slow
@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_ten_steps_of_a_family(family: str, update: str) -> None:
    model, batch = tiny(family, torch.float64)
    plain = copy.deepcopy(model)
    compiled = chunkft_fx.compile(model, "8GB", coverage="all", backend="eager")
    ours = chunkft_fx.AdamW(compiled, lr=1e-3, weight_decay=0.1, update=update)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.1)
    for step in range(10):
        for m, o in ((compiled, ours), (plain, theirs)):
            m(**batch(2, 12, step))[0].backward()
            o.step()
            o.zero_grad()
    for (name, p), q in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("family", list(FAMILIES))
def test_ten_steps_of_a_family_over_micro_batches(family: str) -> None:
    """Three micro-batches a step, whose losses count differently."""
    model, batch = tiny(family, torch.float64)
    plain = copy.deepcopy(model)
    compiled = chunkft_fx.compile(model, "8GB", coverage="all", backend="eager")
    ours = chunkft_fx.AdamW(compiled, lr=1e-3, weight_decay=0.1, update="backward")
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.1)
    shares = (0.5, 0.2, 0.3)
    for step in range(10):
        batches = [batch(2, 12, 3 * step + i) for i in range(3)]
        losses = [outputs[0] for outputs in compiled.accumulate(batches)]
        torch.stack([w * loss for w, loss in zip(shares, losses, strict=True)]).sum().backward()
        for w, b in zip(shares, batches, strict=True):
            (w * plain(**b)[0]).backward()
        for o in (ours, theirs):
            o.step()
            o.zero_grad()
    for (name, p), q in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9, msg=name)

"""Calls in evaluation: no plan is made for them, gradients are right if a backward comes, and they fit the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.errors import BudgetInfeasible, NotPlanned, StaleBackward
from chunkft_fx.planning.batch_plan import BatchPlans
from tests.support.changing_batches import Text, attempt, compiled, smallest, text, watched


def test_evaluation_with_gradients_enabled_makes_no_plan_and_fixes_no_number_of_chunks() -> None:
    model = Text()
    large = text(4, 64)
    budget = smallest(model, large) * 11 // 10
    module = compiled(model, budget)
    module.eval()
    loss = module(**text(2, 4))
    with pytest.raises(NotPlanned):
        _ = module.plan
    torch.testing.assert_close(loss, model(**text(2, 4)))
    module.train()
    assert attempt(module, large)
    alone = compiled(model, budget)
    alone(**large)
    assert len(module.plan.chunks) == len(alone.plan.chunks)


class Dropping(nn.Module):
    """Two layers, with dropout in a part that stays in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(torch.tanh(self.first(x)))).square().mean()


def test_a_backward_in_evaluation_plans_then_and_gives_the_gradients_of_that_forward() -> None:
    model = Dropping()
    module = chunkft_fx.compile(model, "1GB", chunks=1, backend="eager")
    batch = torch.randn(16, 8)
    module.eval()
    model.drop.train()
    for seed in range(2):  # the second time it is expected
        torch.manual_seed(seed)
        loss = module(batch)
        torch.rand(7)  # of no consequence for what is run again
        loss.backward()
        got = {s.name: s.grad for s in module.active_slices()}
        torch.manual_seed(seed)
        want = torch.autograd.grad(model(batch), list(model.parameters()))
        for (name, _), gradient in zip(model.named_parameters(), want, strict=True):
            torch.testing.assert_close(got[name], gradient)
        assert bool(module.plan.batch)
        module.zero_grad()


def test_a_backward_in_evaluation_that_no_plan_fits_is_refused() -> None:
    model = Text()
    module = compiled(model, smallest(model, text(2, 8), chunks=3), chunks=3)
    module.eval()
    loss = module(**text(8, 64))
    with pytest.raises(BudgetInfeasible):
        loss.backward()
    assert not module.plan.batch
    module.train()
    assert attempt(module, text(2, 8))


def test_a_backward_in_evaluation_after_the_weights_changed_is_refused() -> None:
    model = Text()
    module = compiled(model, "1GB", chunks=1)
    module.eval()
    loss = module(**text(2, 8))
    with torch.no_grad():
        module.get_parameter("head.weight").add_(1)
    with pytest.raises(StaleBackward, match="changed in place"):
        loss.backward()


def test_training_in_evaluation_mode_equals_training() -> None:
    model = Text()
    modules = [compiled(model, "1GB", chunks=2) for _ in range(2)]
    modules[1].eval()
    for module in modules:
        optimizer = chunkft_fx.AdamW(module, lr=1e-2)
        for step in range(4):
            module(**text(2, 8, seed=step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_evaluation_that_does_not_fit_beside_training_is_refused() -> None:
    """The sizes of one that fits and one that does not, in any order: with lengths that change, one capture holds."""
    model = Text()
    module = compiled(model, smallest(model, text(4, 16), chunks=3) * 11 // 10, chunks=3)
    assert attempt(module, text(4, 16))
    module.eval()
    with torch.no_grad():
        module(**text(2, 8))
        for _ in range(2):
            with pytest.raises(BudgetInfeasible, match="evaluate smaller batches"):
                module(**text(64, 64))
            module(**text(2, 8))  # as before
            module(**text(3, 9))  # is covered by the refused one


@pytest.mark.parametrize("share", [1.0, 3.0], ids=["weights streamed", "weights on the device"])
def test_what_an_evaluation_is_said_to_need_is_what_it_takes(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients held and without; the budget decides nothing here."""
    model = Text()
    module = compiled(model, int(smallest(model, text(4, 16), chunks=3) * share), chunks=3)
    assert attempt(module, text(4, 16))
    assert bool(module.plan.streamed) == (share == 1.0)
    said: list[int] = []
    predicted = BatchPlans._evaluation_nbytes

    def recorded(*args: Any) -> int:
        said.append(predicted(*args))
        return 0

    monkeypatch.setattr(BatchPlans, "_evaluation_nbytes", recorded)
    module.eval()
    for rows, length in ((2, 8), (64, 64), (5, 7)):
        for held in (True, False):
            if not held:
                module.zero_grad()
            batch = text(rows, length)
            module._training.sessions[-1].plans._evaluated.clear()
            with watched(module, batch) as most, torch.no_grad():
                module(**batch)
            assert most() == said[-1] + module._training.gradient_nbytes, (rows, length, held)

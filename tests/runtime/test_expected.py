"""Which gradients of outputs are expected, and what the first backward holds where others come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.errors import StaleBackward
from chunkft_fx.head import log_probs
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.runtime.session import Session
from tests.predict.test_step_memory import tracked


class Tokens(nn.Module):
    """A head as trainers have it that make their loss of log-probabilities, and an auxiliary loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        hidden = self.body(x).tanh()
        found = log_probs.forward(hidden, self.head.weight, None, labels, 1.0, None, [True, False, False, False])
        return -found[0].mean(), 2 * found[0], found[1], hidden.square().mean()


class Deep(nn.Module):
    """Blocks that save much beside what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x = layer(x).tanh().exp().sin()
        return x.mean(), x.square().mean(1)


def compiled(model: nn.Module) -> CompiledModule:
    torch.manual_seed(0)
    made = chunkft_fx.compile(model, "1GB", chunks=1, backend="eager")
    assert isinstance(made, CompiledModule)
    return made


def forwards(monkeypatch: pytest.MonkeyPatch) -> list[frozenset[str]]:
    """What each forward is run for, from now on."""
    begin = Session.begin
    seen: list[frozenset[str]] = []

    def noted(self: Session, batches: Any, expected: frozenset[str]) -> Any:
        seen.append(expected)
        return begin(self, batches, expected)

    monkeypatch.setattr(Session, "begin", noted)
    return seen


@pytest.mark.parametrize("taken", [(1,), (1, 3)], ids=["log-probabilities", "and an auxiliary loss"])
def test_a_loss_of_log_probabilities_takes_one_forward(taken: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, seen = compiled(Tokens()), forwards(monkeypatch)
    results = ours(torch.randn(6, 8), torch.arange(6) % 5)
    sum(results[i].sum() for i in taken).backward()
    assert len(seen) == 1
    assert len(seen[0]) == 2  # neither the loss that the model makes itself, nor the entropy


def test_the_loss_that_comes_of_log_probabilities_is_right_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, labels = Tokens(), torch.randn(6, 8), torch.arange(6) % 5
    model(x, labels)[0].backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ours, seen = compiled(model), forwards(monkeypatch)
    ours(x, labels)[0].backward()
    assert [len(s) for s in seen] == [2, 1]
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name])


def test_a_forward_that_is_run_again_for_other_gradients_does_not_stand_beside_the_first() -> None:
    ours, x = compiled(Deep()), torch.randn(64, 32)

    def peak(taken: int) -> int:
        with tracked() as live:
            loss = ours(x)[taken].sum()
            with live:
                loss.backward()
        ours.zero_grad()
        return live.peak_nbytes

    peak(1)
    expected = peak(1)
    peak(0)
    assert peak(1) <= expected + 1024  # the loss that the first of the two returned is still there


def test_what_is_retained_is_kept_beside_the_forward_that_is_run_again() -> None:
    ours, x = compiled(Deep()), torch.randn(64, 32)
    rows = ours(x)[1].sum()
    rows.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None}
    rows.backward()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[name])
    with pytest.raises(StaleBackward):
        rows.backward()

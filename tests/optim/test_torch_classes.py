"""Any torch class over slices: equal to the class itself on the plain model, and on slices cut anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import chunkft_fx
from chunkft_fx.optim import update as updates
from tests.support.slice_twin import SliceTwin
from tests.support.small_net import compiled, net

Kind = type[torch.optim.Optimizer]

beta, decay, flag = st.floats(0.1, 0.99), st.sampled_from([0.0, 0.1]), st.booleans()
rate = st.floats(1e-4, 0.1)
betas = st.tuples(beta, beta)
# What is drawn for each class, beside "lr".
CLASSES: dict[Kind, dict[str, st.SearchStrategy[Any]]] = {
    torch.optim.Adam: {"betas": betas, "weight_decay": decay, "amsgrad": flag, "maximize": flag},
    torch.optim.AdamW: {"betas": betas, "weight_decay": decay, "amsgrad": flag, "maximize": flag},
    torch.optim.Adamax: {"betas": betas, "weight_decay": decay, "maximize": flag},
    torch.optim.NAdam: {"betas": betas, "momentum_decay": beta, "decoupled_weight_decay": flag, "weight_decay": decay},
    torch.optim.RAdam: {"betas": betas, "decoupled_weight_decay": flag, "weight_decay": decay, "maximize": flag},
    torch.optim.RMSprop: {"alpha": beta, "momentum": st.sampled_from([0.0, 0.9]), "centered": flag, "maximize": flag},
    torch.optim.Adagrad: {"lr_decay": decay, "initial_accumulator_value": decay, "weight_decay": decay},
    torch.optim.Adadelta: {"rho": beta, "weight_decay": decay, "maximize": flag},
    torch.optim.ASGD: {"lambd": decay, "alpha": beta, "t0": st.sampled_from([2.0, 1e6]), "weight_decay": decay},
    torch.optim.Rprop: {"etas": st.just((0.5, 1.2)), "step_sizes": st.just((1e-6, 0.1)), "maximize": flag},
    torch.optim.SGD: {"momentum": st.sampled_from([0.0, 0.9]), "dampening": decay, "weight_decay": decay},
    torch.optim.Adafactor: {"d": st.floats(1, 2), "weight_decay": decay, "maximize": flag},
}


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Kind, dict[str, Any]]:
    """A class and its options."""
    kind = draw(st.sampled_from([*CLASSES]))
    return kind, {"lr": draw(rate), **{name: draw(strategy) for name, strategy in CLASSES[kind].items()}}


def gradients(model: nn.Module, step: int) -> None:
    """Random gradients for all parameters, the same for the same step."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def assert_close(a: nn.Module, b: nn.Module, tolerance: float) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=name)


@settings(max_examples=25, deadline=None)
@given(choice=drawn(), part=st.sampled_from([7, 2**24]))
def test_one_chunk_equals_the_class_on_the_plain_model(choice: tuple[Kind, dict[str, Any]], part: int) -> None:
    kind, options = choice
    model, plain = compiled(net(torch.float64)), net(torch.float64)
    ours = chunkft_fx.optimizer(model, kind, **options)
    theirs = kind(plain.parameters(), **options)
    schedules = [CosineAnnealingLR(o, 10) for o in (ours, theirs)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "PART_NUMEL", part)
        for step in range(10):
            for trained, optimizer in ((model, ours), (plain, theirs)):
                gradients(trained, step)
                optimizer.step()
            for schedule in schedules:
                schedule.step()
    assert_close(model, plain, 1e-12)


@settings(max_examples=25, deadline=None)
@given(
    choice=drawn(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    chunks=st.integers(1, 12),
    order=st.sampled_from(["ascending", "random"]),
    interval=st.integers(1, 3),
    states=st.sampled_from(["keep", "reset"]),
    rates=st.lists(rate, min_size=12, max_size=12),
)
def test_slices_cut_anywhere_equal_the_class_on_each(
    choice: tuple[Kind, dict[str, Any]],
    dtype: torch.dtype,
    chunks: int,
    order: str,
    interval: int,
    states: str,
    rates: list[float],
) -> None:
    kind, options = choice
    chunks = min(chunks, 9) if kind is torch.optim.Adafactor else chunks  # the net has 10 parameters
    module = compiled(net(dtype), chunks, order, interval)
    optimizer = chunkft_fx.optimizer(module, kind, **options, states=states, schedule_by="step")
    twin = SliceTwin(module, lambda p: kind(p, **options), states == "reset", 1e-5)
    for step, lr in enumerate(rates):
        # as a scheduler sets it, also for slices whose turn it is not
        for torchs in (optimizer, *(o for _, o in twin.known.values())):
            torchs.param_groups[0]["lr"] = lr
        options["lr"] = lr
        twin.step(optimizer, step)

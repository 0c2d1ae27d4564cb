"""Any torch class over slices: equal to the class itself on the plain model, and on slices cut anywhere."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

import chunkft_fx
from chunkft_fx.errors import CheckpointMismatch, OptionError
from chunkft_fx.optim import update as updates
from tests.support.slice_twin import SliceTwin
from tests.support.small_net import batch, compiled, feed, net, train_step

Kind = type[torch.optim.Optimizer]
README = Path(__file__).parents[2] / "README.md"

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


@settings(max_examples=50, deadline=None)
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


SLICES: dict[str, st.SearchStrategy[Any]] = {
    "choice": drawn(),
    "dtype": st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    "chunks": st.integers(1, 12),
    "order": st.sampled_from(["ascending", "random"]),
    "interval": st.integers(1, 3),
    "states": st.sampled_from(["keep", "reset"]),
    "rates": st.lists(rate, min_size=12, max_size=12),
}


@settings(max_examples=15, deadline=None)
@given(**SLICES)
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


def grouped(model: nn.Module, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups that ``no_decay=("*.bias",)`` makes of a model, the second with options of its own."""
    named = dict(model.named_parameters())
    biases = [p for n, p in named.items() if n.endswith(".bias")]
    others = [p for n, p in named.items() if not n.endswith(".bias")]
    return [{"params": others}, {"params": biases, "weight_decay": 0.0, **options}]


@pytest.mark.parametrize(
    ("kind", "options", "update"),
    [
        (torch.optim.NAdam, {"weight_decay": 0.1}, "step"),
        (torch.optim.Adam, {"amsgrad": True, "lr": torch.tensor(0.01)}, "step"),
        (torch.optim.RAdam, {}, "backward"),
        (torch.optim.ASGD, {"t0": 3.0}, "late"),
        (torch.optim.Adafactor, {}, "step"),
    ],
)
def test_full_coverage_equals_the_class_and_checkpoints_go_both_ways(
    kind: Kind, options: dict[str, Any], update: str
) -> None:
    dtype = torch.float64

    def made(weights: nn.Module) -> tuple[Any, Any]:
        model = chunkft_fx.compile(net(dtype), "1GB", coverage="all", backend="eager")
        model.load_state_dict(weights.state_dict())
        optimizer = chunkft_fx.optimizer(model, kind, **options, update=update, no_decay=("*.bias",))
        return model, optimizer

    def train(model: Any, optimizer: Any, plain: nn.Module, theirs: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            train_step(model, optimizer, step, dtype)
            theirs.zero_grad()
            plain(batch(step, dtype)).backward()
            theirs.step()
        assert_close(model, plain, 1e-12)

    plain = net(dtype)
    theirs = kind(grouped(plain, {"lr": 0.02}), **options)
    model, ours = made(plain)
    ours.param_groups[1]["lr"] = 0.02
    train(model, ours, plain, theirs, range(10))
    loaded = kind(grouped(net(dtype), {}), **options)
    loaded.load_state_dict(ours.state_dict())
    for key, state in theirs.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.allclose(value.double(), loaded.state_dict()["state"][key][name].double(), rtol=1e-12)
    model, ours = made(plain)
    ours.load_state_dict(theirs.state_dict())
    train(model, ours, plain, theirs, range(10, 12))


def test_clipping_scales_what_the_class_reads() -> None:
    model, plain = compiled(net(torch.float64)), net(torch.float64)
    ours = chunkft_fx.optimizer(model, torch.optim.RMSprop, momentum=0.5, max_grad_norm=0.3)
    theirs = torch.optim.RMSprop(plain.parameters(), momentum=0.5)
    for step in range(3):
        gradients(model, step)
        gradients(plain, step)
        nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        ours.step()
        theirs.step()
    assert_close(model, plain, 1e-12)


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.ASGD])
def test_a_checkpoint_amid_a_sweep_goes_on_as_if_nothing_had_happened(kind: Kind) -> None:
    def made() -> tuple[Any, Any]:
        model = compiled(net(torch.bfloat16), 5)
        return model, chunkft_fx.optimizer(model, kind, lr=0.1, schedule_by="step")

    def train(model: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)  # numbers of slices with as many steps differ by it
            feed(model, step)
            optimizer.step()

    model, optimizer = made()
    train(model, optimizer, range(7))
    again, other = made()
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(7, 14))
    train(again, other, range(7, 14))
    assert_close(model, again, 0)
    for a, b in zip(optimizer.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True):
        assert a["slice_steps"] == b["slice_steps"]
        assert len({len(run) for run in a["slice_steps"]}) == 1


def test_a_checkpoint_without_a_number_is_refused() -> None:
    model = compiled(net())
    optimizer = chunkft_fx.optimizer(model, torch.optim.NAdam)
    plain = net()
    theirs = torch.optim.NAdam(plain.parameters())
    gradients(plain, 0)
    theirs.step()
    saved = theirs.state_dict()
    saved["state"][0].pop("mu_product")
    with pytest.raises(CheckpointMismatch, match=r"numbers of 'wide' are not readable: KeyError\('mu_product'\)"):
        optimizer.load_state_dict(saved)
    assert not optimizer.has_begun


def test_a_checkpoint_of_another_class_is_refused() -> None:
    optimizer = chunkft_fx.optimizer(compiled(net()), torch.optim.NAdam)
    saved = torch.optim.SGD(net().parameters()).state_dict()
    with pytest.raises(CheckpointMismatch, match=r"not saved by an optimizer\(model, torch.optim.NAdam\) optimizer"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 1.5)}, r"torch.optim.Adam refuses its options: Invalid beta parameter at index 1: 1.5"),
        ({"beta": 0.9}, "unexpected keyword argument 'beta'"),
        ({"fused": True}, "fused=True was set for torch.optim.Adam"),
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"no_decay": ("*.nothing",)}, "matches no trainable parameter"),
    ],
)
def test_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        chunkft_fx.optimizer(compiled(net()), torch.optim.Adam, **options)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"amsgrad": True}, "decide which states torch.optim.Adam keeps"),
        ({"capturable": True}, "capturable=True was set"),
        ({"eps": -1.0}, "Invalid epsilon value"),
    ],
)
def test_options_set_in_a_group_are_refused_before_a_weight_changes(option: dict[str, Any], message: str) -> None:
    model = compiled(net())
    optimizer = chunkft_fx.optimizer(model, torch.optim.Adam)
    feed(model, 0)
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    optimizer.param_groups[0].update(option)
    with pytest.raises(OptionError, match=message):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_schedule_of_momentum_acts() -> None:
    model, plain = compiled(net(torch.float64)), net(torch.float64)
    ours = chunkft_fx.optimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    schedules = [OneCycleLR(o, max_lr=0.1, total_steps=8) for o in (ours, theirs)]
    for step in range(8):
        for trained, optimizer in ((model, ours), (plain, theirs)):
            gradients(trained, step)
            optimizer.step()
        for schedule in schedules:
            schedule.step()
    assert_close(model, plain, 1e-12)


def test_plans_count_with_the_states_that_were_found() -> None:
    found = []
    cases: list[tuple[Kind, dict[str, Any]]] = [(torch.optim.SGD, {}), (torch.optim.Adam, {"amsgrad": True})]
    for kind, options in cases:
        model = chunkft_fx.compile(net(), "1GB", coverage="all", backend="eager")
        optimizer = chunkft_fx.optimizer(model, kind, **options)
        train_step(model, optimizer, 0, torch.float32)
        assert model.plan.policy.states == optimizer.spec
        found.append((optimizer.spec.update_nbytes, model.plan.predicted_peak_bytes or 0))
    assert all(more > less for less, more in zip(*found, strict=True))
    assert chunkft_fx.Plan.from_json(model.plan.to_json()) == model.plan


def test_gradients_stay_as_they_are_where_the_class_changes_them() -> None:
    model = compiled(net(torch.float32))
    optimizer = chunkft_fx.optimizer(model, torch.optim.SGD, momentum=0.9, nesterov=True, foreach=True)
    twin = SliceTwin(model, lambda p: torch.optim.SGD(p, momentum=0.9, nesterov=True))
    for step in range(3):
        twin.step(optimizer, step)  # asserts it


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_many_slices_cut_anywhere_equal_the_class_on_each(data: st.DataObject) -> None:
    """The same once more, for longer."""
    test_slices_cut_anywhere_equal_the_class_on_each.hypothesis.inner_test(  # type: ignore[attr-defined]
        **{name: data.draw(strategy) for name, strategy in SLICES.items()}
    )


def test_the_example_of_the_readme_trains_all_parameters() -> None:
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "fx.optimizer(" in c)
    model, plain = compiled(net()), net()
    known: dict[str, Any] = {"model": model, "chunkft_fx": chunkft_fx, "torch": torch}
    exec(code, known)
    train_step(model, known["optimizer"], 0, torch.float32)
    before = dict(plain.named_parameters())
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n != "unused")


def test_slices_of_one_parameter_with_as_many_steps_keep_numbers_of_their_own() -> None:
    module = compiled(net(torch.float64), 20)
    optimizer = chunkft_fx.optimizer(module, torch.optim.ASGD, schedule_by="step")
    rates = {"lr": 0.1}
    twin = SliceTwin(module, lambda p: torch.optim.ASGD(p, lr=rates["lr"]))
    for step in range(50):
        rates["lr"] = 0.1 / (1 + step)
        for torchs in (optimizer, *(o for _, o in twin.known.values())):
            torchs.param_groups[0].update(rates)
        twin.step(optimizer, step)
    assert any(len(state["slice_steps"]) > 1 for state in optimizer.state_dict()["state"].values())

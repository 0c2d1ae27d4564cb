"""AdamW with masters as remainders, and without first moments: equal updates, fewer bytes, checkpoints of either."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from chunkft_fx.errors import CheckpointMismatch, HostMemoryExceeded, OptionError
from chunkft_fx.kernels.masters import join_master, split_master
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.optim.rules.adamw import AdamW
from chunkft_fx.plan.state_spec import StateSpec, StateTensor
from tests.optim.test_adamw import OPTIONS, assert_equal, fed, train
from tests.support.small_net import batch, compiled, net, train_step

BF16 = torch.bfloat16
# 65,536.5 units of float32 above an even bfloat16: the weights of the two formats differ by one unit of bfloat16.
TIE = 1 + 2**-8


def made(dtype: torch.dtype = BF16, chunks: int = 5, seed: int = 0, **options: Any) -> tuple[CompiledModule, AdamW]:
    model = compiled(net(dtype, seed), chunks)
    return model, AdamW(model, **(OPTIONS | options))


def masters(optimizer: AdamW) -> dict[int, Tensor]:
    """The float32 masters' bits, by parameter."""
    states = optimizer.state_dict()["state"]
    return {i: state["master"].contiguous().view(torch.int32).clone() for i, state in states.items()}


def assert_same_masters(a: dict[int, Tensor], b: dict[int, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[i], b[i]) for i in a)


def saved(model: CompiledModule, optimizer: AdamW) -> dict[str, Any]:
    """A checkpoint, through a file."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    loaded: dict[str, Any] = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    return loaded


def load(model: CompiledModule, optimizer: AdamW, checkpoint: dict[str, Any], first: str) -> None:
    for target in sorted(("model", "optimizer"), key=lambda name: name != first):
        (model if target == "model" else optimizer).load_state_dict(checkpoint[target])


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("states", ["keep", "reset"])
def test_remainders_train_as_float32_masters(state_dtype: str, states: str) -> None:
    """In several chunks, with clipping, groups without decay, and tensors cut where step counts differ."""
    options: dict[str, Any] = {
        "state_dtype": state_dtype,
        "states": states,
        "max_grad_norm": 1.0,
        "no_decay": ("norm.*",),
    }
    (wide, one), (narrow, other) = (made(master=master, **options) for master in ("float32", "remainder"))
    for model, optimizer in ((wide, one), (narrow, other)):
        fed(model, optimizer, range(33))
    if states == "keep":
        assert_same_masters(masters(one), masters(other))
    differ = sum(int((p != q).sum()) for p, q in zip(wide.parameters(), narrow.parameters(), strict=True))
    assert differ < 5  # at ties alone
    assert not torch.equal(narrow.wide, net(BF16).wide)


def test_a_slice_with_several_step_counts_equals_that_of_float32_masters() -> None:
    found = []
    for master in ("float32", "remainder"):
        model, optimizer = made(master=master)
        fed(model, optimizer, range(7))
        second = compiled(copy.deepcopy(model._model), 2)
        resumed = AdamW(second, master=master)
        with pytest.warns(Warning, match="saved with 5 chunks"):
            resumed.load_state_dict(optimizer.state_dict())
        assert any(len(state["slice_steps"]) > 1 for state in resumed.state.values())
        fed(second, resumed, range(7, 13))
        found.append(masters(resumed))
    assert_same_masters(*found)


def test_steps_through_the_model_equal_those_with_float32_masters() -> None:
    (wide, one), (narrow, other) = (made(chunks=2, master=master) for master in ("float32", "remainder"))
    for model, optimizer in ((wide, one), (narrow, other)):
        train(model, optimizer, range(6), BF16)
    assert_same_masters(masters(one), masters(other))


@pytest.mark.parametrize(
    ("dtype", "names"),
    [(BF16, {"remainder"}), (torch.float16, {"master"}), (torch.float32, set()), (torch.float64, set())],
)
def test_only_bfloat16_parameters_have_remainders(dtype: torch.dtype, names: set[str]) -> None:
    model, optimizer = made(dtype, master="remainder")
    fed(model, optimizer, range(5))
    for state in optimizer.state.values():
        assert state.keys() == {"slice_steps", "exp_avg", "exp_avg_sq"} | names
        assert all(state[name].dtype == (torch.int16 if name == "remainder" else torch.float32) for name in names)


@pytest.mark.parametrize(
    ("options", "nbytes"),
    [
        ({}, {BF16: 12, torch.float16: 12, torch.float32: 8}),
        ({"master": "remainder"}, {BF16: 10, torch.float16: 12, torch.float32: 8}),
        ({"master": "remainder", "state_dtype": "bfloat16"}, {BF16: 6, torch.float16: 8, torch.float32: 4}),
        ({"master": "remainder", "betas": (0.0, 0.99)}, {BF16: 6, torch.float16: 8, torch.float32: 4}),
        (
            {"master": "remainder", "betas": (0.0, 0.99), "state_dtype": "bfloat16"},
            {BF16: 4, torch.float16: 6, torch.float32: 2},
        ),
    ],
)
def test_host_memory_takes_the_bytes_of_the_format(options: dict[str, Any], nbytes: dict[torch.dtype, int]) -> None:
    elements = sum(p.numel() for p in net().parameters())
    for dtype, each in nbytes.items():
        model = compiled(net(dtype))
        optimizer = AdamW(model, **options, host_budget=elements * each)
        assert optimizer.spec.element_nbytes((8, 12), dtype) == each
        with pytest.raises(HostMemoryExceeded) as caught:
            AdamW(compiled(net(dtype)), **options, host_budget=elements * each - 1)
        assert ('master="remainder"' in str(caught.value)) == ("master" not in options)
    # gradient and weight (8 bytes) and every state, read and written
    assert optimizer.spec.update_nbytes == 8 + 2 * nbytes[BF16]


def test_memory_planned_for_float32_masters_is_enough_for_remainders_and_not_the_other_way() -> None:
    moments = (StateTensor("exp_avg"), StateTensor("exp_avg_sq"))
    wide, narrow = StateSpec("AdamW", moments), StateSpec("AdamW", moments, master="remainder")
    assert wide.covers(narrow)
    assert not narrow.covers(wide)


def test_a_weight_changed_from_outside_wins_up_to_half_a_unit() -> None:
    model, optimizer = made(chunks=1, master="remainder", lr=1e-4)
    fed(model, optimizer, range(2))
    with torch.no_grad():
        model.wide.fill_(3.0)
    optimizer.param_groups[0]["lr"] = 0.0
    fed(model, optimizer, range(2, 3))
    master = optimizer.state_dict()["state"][0]["master"]
    assert (master - 3).abs().max() <= 2**-7  # a unit is 2**-6 between 2 and 4
    assert torch.equal(model.wide, torch.full_like(model.wide, 3.0))


def with_ties(checkpoint: dict[str, Any], master: str) -> dict[str, Any]:
    """The checkpoint with some masters set to ties, and their weights as this format has them."""
    changed = copy.deepcopy(checkpoint)
    values = torch.tensor([TIE, -TIE, 1 + 3 * 2**-8, 2.0, 3.0 + 2**-7])
    changed["optimizer"]["state"][0]["master"][0, :5] = values
    rounded = split_master(values)[0] if master == "remainder" else values.bfloat16()
    assert (split_master(values)[0] != values.bfloat16()).sum() == 3
    changed["model"]["wide"][0, :5] = rounded
    return changed


@pytest.mark.parametrize("first", ["model", "optimizer"])
@pytest.mark.parametrize("start", ["float32", "remainder"])
def test_a_checkpoint_converts_to_the_other_format_and_back_unchanged(start: str, first: str) -> None:
    model, optimizer = made(master=start)
    fed(model, optimizer, range(8))
    other = {"float32": "remainder", "remainder": "float32"}[start]
    begin = with_ties(saved(model, optimizer), start)
    middle_model, middle = made(seed=5, master=other)
    load(middle_model, middle, begin, first)
    between = saved(middle_model, middle)
    end_model, end = made(seed=6, master=start)
    load(end_model, end, between, first)
    last = saved(end_model, end)
    for found in (between, last):
        assert found["optimizer"]["param_groups"] == begin["optimizer"]["param_groups"]
        assert found["optimizer"]["chunkft"] == begin["optimizer"]["chunkft"]
        assert found["optimizer"]["state"].keys() == begin["optimizer"]["state"].keys()
        for i, state in begin["optimizer"]["state"].items():
            again = found["optimizer"]["state"][i]
            assert again.keys() == state.keys()
            assert again["slice_steps"] == state["slice_steps"]
            assert all(torch.equal(again[key], state[key]) for key in ("step", "exp_avg", "exp_avg_sq", "master"))
    assert not torch.equal(between["model"]["wide"], begin["model"]["wide"])
    for name, value in begin["model"].items():
        assert torch.equal(last["model"][name], value), name


@pytest.mark.parametrize("first", ["model", "optimizer"])
@pytest.mark.parametrize("start", ["float32", "remainder"])
def test_training_goes_on_with_the_same_masters_in_the_other_format(start: str, first: str) -> None:
    model, optimizer = made(master=start)
    fed(model, optimizer, range(8))
    begin = with_ties(saved(model, optimizer), start)
    found = []
    for master in ("float32", "remainder"):
        model, optimizer = made(seed=5, master=master)
        load(model, optimizer, begin, first)
        fed(model, optimizer, range(8, 20))
        found.append(masters(optimizer))
    assert_same_masters(*found)


def test_resume_equals_an_uninterrupted_run() -> None:
    straight, optimizer = made(master="remainder")
    train(straight, optimizer, range(3), BF16)
    checkpoint = saved(straight, optimizer)
    train(straight, optimizer, range(3, 9), BF16)
    model, resumed = made(seed=9, master="remainder")
    load(model, resumed, checkpoint, "optimizer")
    train(model, resumed, range(3, 9), BF16)
    assert_equal(model, straight)
    assert_same_masters(masters(resumed), masters(optimizer))


def test_masters_that_a_checkpoint_lacks_are_the_weights() -> None:
    plain = net()
    theirs = torch.optim.AdamW(plain.parameters(), **OPTIONS)
    plain(batch(0)).backward()
    theirs.step()
    model, ours = made(chunks=1, master="remainder")
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.state_dict()["state"][0]["master"], model.wide.float())


def test_ties_of_a_parameter_that_is_replaced_after_loading_are_those_of_the_new_one() -> None:
    model, optimizer = made(chunks=1)
    fed(model, optimizer, range(2))
    begin = with_ties(saved(model, optimizer), "float32")
    model, optimizer = made(chunks=1, master="remainder")
    load(model, optimizer, begin, "model")
    wide = nn.Parameter(model._model.get_parameter("wide").detach().clone())
    model._model.wide = wide
    state = optimizer.state_dict()["state"][0]
    assert torch.equal(state["master"], begin["optimizer"]["state"][0]["master"])
    assert torch.equal(join_master(wide.detach(), optimizer.state[wide]["remainder"]), state["master"])


def test_an_unknown_master_is_refused() -> None:
    with pytest.raises(OptionError, match="master='int8'"):
        AdamW(compiled(net(BF16)), master="int8")


WITHOUT: dict[str, Any] = OPTIONS | {"betas": (0.0, 0.99)}


def torchs(steps: range, model: nn.Module, **options: Any) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters(), **(WITHOUT | options))
    for step in steps:
        optimizer.zero_grad()
        model(batch(step)).backward()
        optimizer.step()
    return optimizer


def test_without_a_first_moment_updates_equal_torch_to_the_bit() -> None:
    model, plain = compiled(net()), net()
    ours = AdamW(model, **WITHOUT)
    train(model, ours, range(20))
    torchs(range(20), plain)
    assert_equal(model, plain)
    assert all(state.keys() == {"slice_steps", "exp_avg_sq"} for state in ours.state.values())


@pytest.mark.parametrize("dtype", [BF16, torch.float64])
def test_without_a_first_moment_updates_equal_those_with_one(dtype: torch.dtype) -> None:
    found = []
    for betas in ((0.0, 0.99), (0.9, 0.99)):
        model, optimizer = made(dtype, betas=betas)
        optimizer.param_groups[0]["betas"] = (0.0, 0.99)
        fed(model, optimizer, range(16))
        assert all(("exp_avg" in state) == (betas[0] != 0) for state in optimizer.state.values())
        found.append(model)
    assert_equal(*found)


def test_first_moments_cannot_be_had_afterwards() -> None:
    model, optimizer = made(torch.float32, betas=(0.0, 0.99))
    optimizer.param_groups[0]["betas"] = (0.9, 0.99)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OptionError, match=r"betas=\(0.9, 0.99\).*no first moments"):
        fed(model, optimizer, range(1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model, optimizer = made(torch.float32, betas=(0.0, 0.99))
    OneCycleLR(optimizer, max_lr=0.05, total_steps=25)  # it cycles betas too
    with pytest.raises(OptionError, match="no first moments"):
        fed(model, optimizer, range(1))


def test_checkpoints_with_and_without_a_first_moment_load_into_either() -> None:
    plain = net()
    theirs = torchs(range(4), plain)
    straight = copy.deepcopy(plain)
    model = compiled(plain)
    without = AdamW(model, **WITHOUT)
    without.load_state_dict(theirs.state_dict())
    assert without.state_dict()["state"][0].keys() == {"step", "exp_avg_sq", "slice_steps"}
    train(model, without, range(4, 6))
    second = compiled(copy.deepcopy(plain))
    with_one = AdamW(second)
    with_one.load_state_dict(without.state_dict())
    assert not any(state["exp_avg"].any() for state in with_one.state.values())
    train(second, with_one, range(6, 8))
    last = torch.optim.AdamW(straight.parameters())
    last.load_state_dict(theirs.state_dict())
    for step in range(4, 8):
        last.zero_grad()
        straight(batch(step)).backward()
        last.step()
    assert_equal(second, straight)
    assert_equal(_torch_again(second, with_one, straight, last), straight)


def _torch_again(model: CompiledModule, ours: AdamW, straight: nn.Module, last: torch.optim.Optimizer) -> nn.Module:
    """The model after one more step of torch's optimizer from our checkpoint, and the other after one of its own."""
    plain = copy.deepcopy(model._model)
    theirs = torch.optim.AdamW(plain.parameters())
    theirs.load_state_dict(ours.state_dict())
    for module, optimizer in ((plain, theirs), (straight, last)):
        optimizer.zero_grad()
        module(batch(8)).backward()
        optimizer.step()
    return plain


@pytest.mark.parametrize("trained", [True, False])
def test_first_moments_that_are_read_are_never_dropped_or_made_up(trained: bool) -> None:
    model, with_one = made(torch.float32)
    empty, without = made(torch.float32, betas=(0.0, 0.99))
    if trained:
        train_step(model, with_one, 0, torch.float32)
    with pytest.raises(CheckpointMismatch, match=r"group 0 of the checkpoint.*no first moments"):
        without.load_state_dict(with_one.state_dict())
    assert without.param_groups[0]["betas"] == (0.0, 0.99)
    fed(empty, without, range(5))
    broken = copy.deepcopy(without.state_dict())
    broken["param_groups"][0]["betas"] = (0.9, 0.99)
    with pytest.raises(CheckpointMismatch, match=r"'wide' holds \['exp_avg_sq'\]"):
        with_one.load_state_dict(broken)

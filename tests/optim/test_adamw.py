"""AdamW: equal to torch's, to a reference with per-slice steps, and to itself after a checkpoint."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

import chunkft_fx
from chunkft_fx.errors import CheckpointMismatch, ChunkFTWarning, NoTrainableParameters, OptimizerMismatch, OptionError
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.optim.rules.adamw import AdamW
from tests.support.small_net import Net, batch, compiled, dense_gradients, feed, net, train_step

OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def constant(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 1.0)


def one_cycle(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=0.05, total_steps=25)


def linear_with_warmup(optimizer: torch.optim.Optimizer) -> LRScheduler:
    transformers = pytest.importorskip("transformers")
    schedule: LRScheduler = transformers.get_scheduler("linear", optimizer, num_warmup_steps=5, num_training_steps=25)
    return schedule


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


def train(module: CompiledModule, optimizer: AdamW, steps: range, dtype: torch.dtype = torch.float32) -> None:
    for step in steps:
        train_step(module, optimizer, step, dtype)


def fed(module: CompiledModule, optimizer: AdamW, steps: range) -> None:
    """Steps with random gradients, where only the states matter."""
    for step in steps:
        feed(module, step)
        optimizer.step()


@pytest.mark.parametrize(
    ("dtype", "max_grad_norm", "schedule"),
    [
        (torch.float32, None, constant),
        (torch.float32, 0.05, one_cycle),
        (torch.float32, 0.05, linear_with_warmup),
        (torch.float64, 0.05, one_cycle),
    ],
)
def test_one_chunk_equals_torch_to_the_bit(
    dtype: torch.dtype, max_grad_norm: float | None, schedule: Callable[[torch.optim.Optimizer], LRScheduler]
) -> None:
    model, plain = compiled(net(dtype)), net(dtype)
    ours, theirs = (
        AdamW(model, **OPTIONS, max_grad_norm=max_grad_norm),
        torch.optim.AdamW(plain.parameters(), **OPTIONS),
    )
    our_schedule, their_schedule = schedule(ours), schedule(theirs)
    for step in range(20):
        train_step(model, ours, step, dtype)
        our_schedule.step()
        theirs.zero_grad()
        plain(batch(step, dtype)).backward()
        if max_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm)
            assert norm > max_grad_norm
            assert torch.equal(norm, torch.as_tensor(ours.last_grad_norm))
        theirs.step()
        their_schedule.step()
        assert_equal(model, plain)
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]


class Reference:
    """AdamW written out from the paper's algorithm, per element, with one step count for each element."""

    def __init__(self, model: Net) -> None:
        self.model = model
        self.state = {
            n: [torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)] for n, p in model.named_parameters()
        }

    def step(self, gradients: dict[str, Tensor], active: dict[str, Tensor]) -> None:
        """Update where ``active`` (a mask by name) says so."""
        lr, (beta1, beta2), eps, decay = (OPTIONS[k] for k in ("lr", "betas", "eps", "weight_decay"))
        for name, p in self.model.named_parameters():
            if name not in gradients or name not in active:
                continue
            m, v, t = self.state[name]
            g, mask = gradients[name], active[name]
            t.add_(mask)
            m.copy_(torch.where(mask, beta1 * m + (1 - beta1) * g, m))
            v.copy_(torch.where(mask, beta2 * v + (1 - beta2) * g * g, v))
            new = p * (1 - lr * decay) - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
            with torch.no_grad():
                p.copy_(torch.where(mask, new, p))


def masks(module: CompiledModule) -> dict[str, Tensor]:
    """Which elements are active, by parameter name."""
    active = {}
    for s in module.active_slices():
        mask = torch.zeros(s.parameter.shape, dtype=torch.bool)
        (mask if s.slice.is_whole else mask.narrow(s.dim, s.start, s.length)).fill_(True)
        active[s.name] = mask
    return active


def whole_gradients(module: CompiledModule) -> dict[str, Tensor]:
    """The gradients of the active slices by parameter name, in zeros of the parameter's shape."""
    gradients = {}
    for s in module.active_slices():
        if s.grad is not None:
            whole = torch.zeros(s.parameter.shape, dtype=s.grad.dtype)
            (whole if s.slice.is_whole else whole.narrow(s.dim, s.start, s.length)).copy_(s.grad)
            gradients[s.name] = whole
    return gradients


@pytest.mark.parametrize(("order", "interval"), [("ascending", 1), ("descending", 2), ("random", 3)])
def test_chunks_equal_a_reference_with_steps_per_slice(order: str, interval: int) -> None:
    model, plain = compiled(net(torch.float64), 5, order, interval), net(torch.float64)
    optimizer, reference = AdamW(model, **OPTIONS), Reference(plain)
    for step in range(3 * 5 * interval):
        active = masks(model)
        train_step(model, optimizer, step, torch.float64)
        reference.step(dense_gradients(plain, plain(batch(step, torch.float64))), active)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    assert model.schedule.sweep == 3


def test_a_slice_with_several_step_counts_is_updated_run_by_run() -> None:
    model, plain = net(torch.float64), net(torch.float64)
    first = compiled(model, 5)
    optimizer, reference = AdamW(first, **OPTIONS), Reference(plain)
    for step in range(7):
        active = masks(first)
        train_step(first, optimizer, step, torch.float64)
        reference.step(dense_gradients(plain, plain(batch(step, torch.float64))), active)
    second = compiled(copy.deepcopy(model), 2)
    resumed = AdamW(second, **OPTIONS)
    with pytest.warns(ChunkFTWarning, match="saved with 5 chunks"):
        resumed.load_state_dict(optimizer.state_dict())
    assert any(len(state["slice_steps"]) > 1 for state in resumed.state.values())
    for step in range(7, 13):
        active = masks(second)
        train_step(second, resumed, step, torch.float64)
        reference.step(dense_gradients(plain, plain(batch(step, torch.float64))), active)
        for p, q in zip(second.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_the_rounded_float32_master(dtype: torch.dtype) -> None:
    model = compiled(net(dtype), 3)
    masters = net(dtype).float()
    optimizer, reference = AdamW(model, **OPTIONS), Reference(masters)
    for step in range(9):
        active = masks(model)
        optimizer.zero_grad()
        model(batch(step, dtype)).backward()
        gradients = whole_gradients(model)
        optimizer.step()
        reference.step(gradients, active)
    state = optimizer.state_dict()["state"]
    for i, ((name, p), q) in enumerate(zip(model.named_parameters(), masters.parameters(), strict=True)):
        if i in state:
            torch.testing.assert_close(state[i]["master"], q.detach(), rtol=1e-5, atol=1e-6)
            assert torch.equal(state[i]["master"].to(dtype), p), name
    assert len(state) == 9  # all but the unused parameter


def test_the_second_moment_decays_below_what_bfloat16_resolves() -> None:
    model = compiled(net(torch.bfloat16))
    optimizer = AdamW(model, lr=0.0, betas=(0.9, 0.999))
    train(model, optimizer, range(1), torch.bfloat16)
    state = optimizer.state[model.head.weight]
    before = state["exp_avg_sq"].double().clone()
    for _ in range(10):
        for s in model.active_slices():
            s.grad = torch.zeros(s.weight().shape)
        optimizer.step()
    assert state["exp_avg_sq"].dtype == torch.float32
    torch.testing.assert_close(state["exp_avg_sq"].double(), before * 0.999**10, rtol=1e-6, atol=0)


def test_a_weight_changed_from_outside_wins_over_its_master() -> None:
    model = compiled(net(torch.bfloat16))
    optimizer = AdamW(model, lr=1e-4)
    train(model, optimizer, range(2), torch.bfloat16)
    with torch.no_grad():
        model.wide.fill_(3.0)
    train(model, optimizer, range(2, 3), torch.bfloat16)
    assert (model.wide - 3).abs().max() < 0.05
    assert (optimizer.state[model.wide]["master"] - 3).abs().max() < 0.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_equals_an_uninterrupted_run(dtype: torch.dtype) -> None:
    """Saved after 1, 4 and 8 of 20 steps: at a switch, in the midst of an interval, and in a later sweep."""
    straight = compiled(net(dtype), 5, "random", 2)
    optimizer = AdamW(straight, **OPTIONS, max_grad_norm=1.0)
    saved = {}
    for step in range(20):
        if step in (1, 4, 8):
            saved[step] = io.BytesIO()
            torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, saved[step])
        train_step(straight, optimizer, step, dtype)
    second = compiled(net(dtype, seed=9), 5, "random", 2)
    for at, file in saved.items():
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        resumed = AdamW(second)
        resumed.max_grad_norm = 1.0
        resumed.load_state_dict(loaded["optimizer"])
        second.load_state_dict(loaded["model"])
        train(second, resumed, range(at, 20), dtype)
        assert_equal(second, straight)


def test_another_number_of_chunks_starts_a_new_sweep_with_the_same_states() -> None:
    model = net()
    first = compiled(model, 5)
    optimizer = AdamW(first, **OPTIONS)
    train(first, optimizer, range(8))
    second = compiled(copy.deepcopy(model), 3)
    resumed = AdamW(second, **OPTIONS)
    with pytest.warns(ChunkFTWarning, match="begins"):
        resumed.load_state_dict(optimizer.state_dict())
    assert second.schedule.state_dict()["position"] == 0
    before, after = optimizer.state_dict()["state"], resumed.state_dict()["state"]
    assert before.keys() == after.keys()
    for i, state in before.items():
        assert state["slice_steps"] == after[i]["slice_steps"]
        assert torch.equal(state["exp_avg"], after[i]["exp_avg"])
        assert torch.equal(state["exp_avg_sq"], after[i]["exp_avg_sq"])


def test_a_torch_checkpoint_continues_to_the_bit_and_back() -> None:
    straight, plain = net(), net()
    optimizer = torch.optim.AdamW(straight.parameters(), **OPTIONS)
    short = torch.optim.AdamW(plain.parameters(), **OPTIONS)
    for step in range(12):
        optimizer.zero_grad()
        straight(batch(step)).backward()
        optimizer.step()
        if step < 4:
            short.zero_grad()
            plain(batch(step)).backward()
            short.step()
    middle = compiled(plain)
    ours = AdamW(middle)
    ours.load_state_dict(short.state_dict())
    train(middle, ours, range(4, 8))
    checkpoint = ours.state_dict()
    plain = copy.deepcopy(plain)  # what a compiled module trains belongs to it
    last = torch.optim.AdamW(plain.parameters())
    last.load_state_dict(checkpoint)
    for step in range(8, 12):
        last.zero_grad()
        plain(batch(step)).backward()
        last.step()
    assert_equal(plain, straight)


def test_loading_a_torch_checkpoint_takes_the_weights_as_masters() -> None:
    model, plain = compiled(net(torch.bfloat16)), net()
    theirs = torch.optim.AdamW(plain.parameters(), **OPTIONS)
    plain(batch(0)).backward()
    theirs.step()
    ours = AdamW(model)
    ours.load_state_dict(theirs.state_dict())
    before = model.wide.detach().float().clone()
    ours.param_groups[0]["lr"] = 0.0
    train(model, ours, range(1, 2), torch.bfloat16)
    assert torch.equal(ours.state[model.wide]["master"], before)
    assert ours.state_dict()["state"][0]["step"] == 2


def test_the_layout_is_that_of_torch() -> None:
    model, plain = compiled(net(torch.bfloat16), 4), net()
    ours, theirs = AdamW(model, **OPTIONS), torch.optim.AdamW(plain.named_parameters(), **OPTIONS)
    train(model, ours, range(5), torch.bfloat16)
    plain(batch(0)).backward()
    theirs.step()
    a, b = ours.state_dict(), theirs.state_dict()
    assert a["param_groups"][0]["params"] == b["param_groups"][0]["params"]
    assert a["param_groups"][0]["param_names"] == b["param_groups"][0]["param_names"]
    assert a["state"].keys() == b["state"].keys()
    for i, state in b["state"].items():
        assert a["state"][i].keys() == state.keys() | {"master", "slice_steps"}
        assert a["state"][i]["exp_avg"].shape == state["exp_avg"].shape
        assert a["state"][i]["exp_avg"].dtype == torch.float32
        assert a["state"][i]["step"].dtype == state["step"].dtype
        assert a["state"][i]["step"] == max(step for _, _, step in a["state"][i]["slice_steps"])


def test_a_checkpoint_has_the_masters_of_slices_that_were_never_active() -> None:
    model = compiled(net(torch.bfloat16), 60)
    optimizer = AdamW(model)
    fed(model, optimizer, range(1))
    (state,) = optimizer.state_dict()["state"].values()
    assert {step for _, _, step in state["slice_steps"]} == {0, 1}
    assert torch.equal(state["master"].bfloat16(), model.wide)


def test_loading_copies_the_given_tensors() -> None:
    model = compiled(net(), 2)
    optimizer = AdamW(model, **OPTIONS)
    fed(model, optimizer, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    resumed = AdamW(model)
    resumed.load_state_dict(saved)
    fed(model, resumed, range(4, 8))
    for i, state in kept["state"].items():
        assert torch.equal(state["exp_avg"], saved["state"][i]["exp_avg"])
        assert state["slice_steps"] == saved["state"][i]["slice_steps"]


def test_state_is_made_only_for_chunks_that_were_reached() -> None:
    model = compiled(net(), 9)
    optimizer = AdamW(model)
    assert not optimizer.state
    fed(model, optimizer, range(1))
    assert 0 < len(optimizer.state) < 4


def test_no_decay_patterns_make_a_second_group() -> None:
    model, plain = compiled(net()), net()
    optimizer = AdamW(model, **OPTIONS, no_decay=("*.bias", "norm.*"))
    kept = [(n, p) for n, p in plain.named_parameters() if n.endswith(".bias") or n.startswith("norm.")]
    rest = [(n, p) for n, p in plain.named_parameters() if n not in dict(kept)]
    assert [g["param_names"] for g in optimizer.param_groups] == [[n for n, _ in rest], [n for n, _ in kept]]
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in rest]},
        {"params": [p for _, p in kept], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, **OPTIONS)
    for step in range(5):
        train_step(model, optimizer, step, torch.float32)
        theirs.zero_grad()
        plain(batch(step)).backward()
        theirs.step()
    assert_equal(model, plain)


def test_zero_grad_drops_or_zeroes() -> None:
    model = compiled(net(), 2)
    optimizer = AdamW(model)
    model(batch(0)).backward()
    kept = [s.grad for s in model.active_slices()]
    assert any(k is not None and k.any() for k in kept)
    optimizer.zero_grad(set_to_none=False)
    assert all(s.grad is k for s, k in zip(model.active_slices(), kept, strict=True))
    assert all(not k.any() for k in kept if k is not None)
    optimizer.zero_grad()
    assert all(s.grad is None for s in model.active_slices())


def test_without_gradients_nothing_happens() -> None:
    model = compiled(net(), 3)
    optimizer = AdamW(model)
    optimizer.step()
    assert model.schedule.chunk == 0
    assert not optimizer.state


def test_a_chunk_without_gradient_counts_its_step_with_one_warning() -> None:
    model = net()
    for name, p in model.named_parameters():
        p.requires_grad_(name == "head.bias")
    model.unused = nn.Parameter(torch.ones(7))
    module = compiled(model, 2)
    assert [[s.name for s in c.slices] for c in module.plan.chunks] == [["unused"], ["head.bias"]]
    optimizer = AdamW(module)
    for step in range(4):
        before = {n: p.detach().clone() for n, p in module.named_parameters()}
        with pytest.warns(ChunkFTWarning, match="unused") if step == 0 else nullcontext():
            train_step(module, optimizer, step, torch.float32)
        changed = [n for n, p in module.named_parameters() if not torch.equal(p, before[n])]
        assert changed == (["head.bias"] if step % 2 else [])
    assert (module.schedule.sweep, module.schedule.position, module.schedule.steps) == (2, 0, 0)


def test_before_there_is_a_plan_the_optimizer_can_be_made_and_saved() -> None:
    optimizer = AdamW(chunkft_fx.compile(net(), "1GB", chunks="auto", backend="eager"))
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.state_dict()["state"] == {}


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    model = compiled(net(), 2)
    optimizer = AdamW(model)
    before = model.wide.detach().clone()

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(batch(0))
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == net()(batch(0)).item()
    assert not torch.equal(before, model.wide)


def test_hooks_of_torch_run() -> None:
    model = compiled(net())
    optimizer = AdamW(model)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append(f"saved {len(state['state'])}"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    train(model, optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "saved 9", "loading", "loaded"]


def test_a_norm_that_is_not_finite_is_reported_like_torch_does() -> None:
    model = compiled(net(), 2)
    optimizer = AdamW(model, max_grad_norm=1.0)
    (model(batch(0)) * float("inf")).backward()
    optimizer.step()
    assert optimizer.last_grad_norm is not None
    assert not optimizer.last_grad_norm.isfinite()


@pytest.mark.parametrize(
    "wrong",
    [net, lambda: list(net().parameters()), lambda: [{"params": []}], lambda: None]
    + [lambda: torch.compile(net()), lambda: torch.compile(compiled(net()))],
)
def test_anything_but_a_compiled_module_is_refused(wrong: Callable[[], Any]) -> None:
    with pytest.raises(OptimizerMismatch, match=r"chunkft_fx\.compile"):
        AdamW(wrong())


@pytest.mark.parametrize(
    "options",
    [{"lr": -1.0}, {"lr": float("nan")}, {"betas": (0.9, 1.0)}, {"betas": (0.9,)}, {"eps": -1e-8}]
    + [{"weight_decay": -0.1}, {"max_grad_norm": 0.0}, {"max_grad_norm": float("nan")}, {"no_decay": ("*.missing",)}],
)
def test_hyperparameters_out_of_range_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        AdamW(compiled(net()), **options)


def test_a_frozen_model_is_refused() -> None:
    model = net()
    module = compiled(model, 2)
    model.requires_grad_(False)
    with pytest.raises(NoTrainableParameters, match="requires_grad"):
        AdamW(module)


@pytest.mark.parametrize("change", ["shape", "dtype", "parameter"])
@pytest.mark.parametrize("chunks", [1, 5])
def test_slices_that_do_not_fit_are_refused_before_anything_changes(change: str, chunks: int) -> None:
    model = compiled(net(), chunks)
    optimizer = AdamW(model)
    feed(model, 0)
    last = next(s for s in model.active_slices() if s.slice.is_whole == (chunks == 1))
    assert last.grad is not None
    if change == "parameter":
        last.parameter = nn.Parameter(last.parameter.detach().clone())
        last.grad = torch.zeros(last.weight().shape)
        refusal: Any = pytest.raises(OptimizerMismatch, match=last.name)
    elif change == "shape" and chunks == 5:  # whoever sets a slice's gradient answers for its shape
        last.grad = last.grad[:, :1]
        refusal = pytest.raises(OptimizerMismatch, match=last.name)
    else:  # torch itself refuses these
        wrong = last.grad.double() if change == "dtype" else last.grad.reshape(1, *last.grad.shape)
        with pytest.raises((RuntimeError, TypeError), match="grad"):
            last.grad = wrong
        return
    with refusal:
        optimizer.step()
    assert_equal(model, net())
    assert not optimizer.state


@functools.cache
def trained(steps: int) -> AdamW:
    """An optimizer of ``net()`` in two chunks after some steps in bfloat16; it keeps its module."""
    model = compiled(net(torch.bfloat16), 2)
    optimizer = AdamW(model)
    for step in range(steps):
        feed(model, step)
        optimizer.step()
    return optimizer


def broken(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """A checkpoint of ``net()`` after three steps in bfloat16, with one thing changed."""
    state = copy.deepcopy(trained(3).state_dict())
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("param_groups"), "no optimizer checkpoint"),
        (lambda c: c["param_groups"].append(c["param_groups"][0]), "2 parameter group"),
        (lambda c: c["param_groups"][0].pop("betas"), "lacks betas"),
        (lambda c: c["param_groups"][0]["params"].pop(), "has 9 parameters, the optimizer's has 10"),
        (lambda c: c["param_groups"][0]["param_names"].__setitem__(1, "other"), "'other'"),
        (lambda c: c["param_groups"][0].update(amsgrad=True), "amsgrad"),
        (lambda c: c["state"].update({99: {}}), "99"),
        (lambda c: c["chunkft"].pop("parameters"), "not readable"),
        (lambda c: c["chunkft"]["parameters"].pop(), "describes 9"),
        (lambda c: c["chunkft"]["parameters"][0].__setitem__(1, [8, 13]), r"\(8, 13\)"),
        (lambda c: c["chunkft"]["position"].update(position=7), "not a position"),
        (lambda c: c["state"][0].pop("exp_avg"), "'wide' holds"),
        (lambda c: c["state"][0].update(max_exp_avg_sq=torch.zeros(8, 12)), "max_exp_avg_sq"),
        (lambda c: c["state"][0].update(exp_avg=torch.zeros(12, 8)), r"exp_avg of 'wide' has shape \(12, 8\)"),
        (lambda c: c["state"][0].update(exp_avg=None), "exp_avg of 'wide'"),
        (lambda c: c["state"][0].update(exp_avg=torch.zeros(8, 12, dtype=torch.float64)), "would round"),
        (lambda c: c["state"][0].update(slice_steps=[[0, 11, 1]]), "do not cover"),
        (lambda c: c["state"][0].update(slice_steps=[[0, 12, 0.5]]), "do not cover"),
        (lambda c: c["state"][0].update(slice_steps=[[0, 12]]), "not readable"),
        (lambda c: c["chunkft"]["parameters"][0].__setitem__(2, 7), "do not cover"),
        (
            lambda c: (
                c["chunkft"]["parameters"][0].__setitem__(2, 0),
                c["state"][0].update(slice_steps=[[0, 4, 1], [4, 4, 2]]),
            ),
            "cut along dimension 0",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(
    change: Callable[[dict[str, Any]], object], message: str
) -> None:
    optimizer = trained(1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointMismatch, match=message):
        optimizer.load_state_dict(broken(change))
    after = optimizer.state_dict()
    assert after["chunkft"] == before["chunkft"]
    assert after["param_groups"] == before["param_groups"]
    for i, state in before["state"].items():
        assert all(torch.equal(state[k], after["state"][i][k]) for k in ("exp_avg", "exp_avg_sq", "master"))


def test_a_uniform_step_count_survives_another_cut_dimension() -> None:
    def along_rows(checkpoint: dict[str, Any]) -> None:
        checkpoint["chunkft"]["parameters"][0][2] = 0
        checkpoint["state"][0]["slice_steps"] = [[0, 8, 2]]

    optimizer = AdamW(compiled(net(torch.bfloat16), 2))
    optimizer.load_state_dict(broken(along_rows))
    assert optimizer.state_dict()["state"][0]["slice_steps"] == [[0, 12, 2]]


def test_masters_of_another_dtype_are_refused() -> None:
    with pytest.raises(CheckpointMismatch, match="own master"):
        AdamW(compiled(net(), 2)).load_state_dict(broken(lambda c: None))

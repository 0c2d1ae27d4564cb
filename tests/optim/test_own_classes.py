"""Classes of a user's own: run over slices or whole parameters, or refused with the reason, by what they do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import chunkft_fx
from chunkft_fx.errors import OptimizerMismatch, OptimizerNotSupported, OptionError
from chunkft_fx.optim.classes import torch_optimizer
from chunkft_fx.optim.states.numbers import Number
from tests.support.slice_twin import SliceTwin
from tests.support.small_net import compiled, feed, net

LIMITS = Path(__file__).parents[2] / "docs" / "limits.md"


class Own(torch.optim.Optimizer):
    """The frame of a class of one's own: `move` changes a parameter by its gradient, its state and its group."""

    defaults_of_class: dict[str, Any] = {}  # noqa: RUF012 - read only

    def __init__(self, params: Iterable[Any], lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, **self.defaults_of_class})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self.before(group)
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, p.grad, self.state[p], group)

    def before(self, group: dict[str, Any]) -> None:
        pass

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


class Lion(Own):
    """Elementwise; puts new tensors into its state, and counts in an int."""

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        momentum = state.get("momentum", torch.zeros_like(p))
        state["count"] = state.get("count", 0) + 1
        p -= group["lr"] / state["count"] * torch.sign(0.9 * momentum + 0.1 * g)
        state["momentum"] = 0.99 * momentum + 0.01 * g


class NewMemory(Own):
    """Elementwise; gives parameters other memory."""

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.data = p.data - group["lr"] * g


class TrustRatio(Own):
    """By norms of the whole parameter, as LARS, whose last one it keeps."""

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["norm"] = 0.5 * state.get("norm", g.norm()) + 0.5 * g.norm()
        p -= group["lr"] * (1 + p.norm()) / (1 + state["norm"]) * g


class RowWise(Own):
    """By means over rows, which cuts between rows alone would leave whole."""

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        name, last = ("rows", g.mean(-1, keepdim=True)) if g.ndim > 1 else ("last", g.clone())
        p -= group["lr"] * (g - 0.5 * last - state.get(name, last))
        state[name] = last


@pytest.mark.parametrize("kind", [Lion, NewMemory])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_elementwise_classes_run_over_slices(kind: type[Own], dtype: torch.dtype) -> None:
    module = compiled(net(dtype), 20)
    optimizer = chunkft_fx.optimizer(module, kind, lr=0.1)
    assert not optimizer.spec.is_whole
    assert any(not s.is_whole for c in module.plan.chunks for s in c.slices)
    twin = SliceTwin(module, lambda p: kind(p, lr=0.1))
    for step in range(45):
        twin.step(optimizer, step)
    assert optimizer.numbers_of(module.wide) == ((Number("count", "int"),) if kind is Lion else ())


@pytest.mark.parametrize("kind", [TrustRatio, RowWise])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_classes_run_over_whole_parameters(kind: type[Own], dtype: torch.dtype) -> None:
    module = compiled(net(dtype), 3)
    optimizer = chunkft_fx.optimizer(module, kind, lr=0.1)
    assert optimizer.spec.is_whole
    assert all(s.is_whole for c in module.plan.chunks for s in c.slices)
    twin = SliceTwin(module, lambda p: kind(p, lr=0.1))
    for step in range(7):
        twin.step(optimizer, step)


class GlobalNorm(Own):
    def before(self, group: dict[str, Any]) -> None:
        self.norm = sum(float(p.grad.norm()) for p in group["params"] if p.grad is not None)

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p -= group["lr"] * g / self.norm


class ByNorm(Own):
    """By the norm of the whole gradient, of which its state says nothing."""

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p -= group["lr"] * g / (1 + g.norm())


class Clipped(Own):
    """By the norm of the whole gradient where that is large."""

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p -= group["lr"] * g * (1000 / (1 + g.norm())).clamp(max=1)


class Floored(Own):
    """By the norm of the whole gradient where that is small."""

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p -= group["lr"] * g / g.norm().clamp(max=1e-2)


@pytest.mark.parametrize("rate", [0.01, 1e-5, 0.0, torch.tensor(1e-6)])
@pytest.mark.parametrize("kind", [torch.optim.Muon, ByNorm, Clipped, Floored, GlobalNorm])
def test_what_a_class_needs_is_found_at_any_rate_and_size_of_gradients(
    kind: type[torch.optim.Optimizer], rate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in float32, where an update at a small rate is lost beside the weight."""
    monkeypatch.setattr(torch_optimizer, "_KNOWN", WeakKeyDictionary())  # what was found at another rate
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))
    module = chunkft_fx.compile(model, "1GB", chunks=1, backend="eager")
    if kind is GlobalNorm:
        with pytest.raises(OptimizerNotSupported, match="depends on the others"):
            chunkft_fx.optimizer(module, kind, lr=rate)
    else:
        assert chunkft_fx.optimizer(module, kind, lr=rate).spec.is_whole


def test_a_class_that_needs_whole_parameters_comes_too_late() -> None:
    module = compiled(net(), 20)
    first = chunkft_fx.optimizer(module, Lion)
    feed(module, 0)
    first.step()
    with pytest.raises(OptimizerMismatch, match=r"optimizer\(model, .*TrustRatio\) updates a parameter by numbers of"):
        chunkft_fx.optimizer(module, TrustRatio)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_class_of_the_page_of_limits_runs_muon_for_matrices_and_adamw_for_the_rest(dtype: torch.dtype) -> None:
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", LIMITS.read_text(), re.DOTALL) if "MuonAndAdamW" in c)
    known: dict[str, Any] = {"torch": torch, "chunkft_fx": chunkft_fx, "model": compiled(nn.Linear(8, 8))}
    exec(code, known)
    kind = known["MuonAndAdamW"]

    def made() -> tuple[Any, Any]:
        torch.manual_seed(0)
        layers = (nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8))
        module = compiled(nn.Sequential(*layers).to(dtype), 4)
        return module, chunkft_fx.optimizer(module, kind, lr=0.1)

    module, optimizer = made()
    kept = {t.name: t.of for t in optimizer.spec.tensors}
    assert kept == {"momentum_buffer": "matrices", "exp_avg": "vectors", "exp_avg_sq": "vectors"}
    twin = SliceTwin(module, lambda p: kind(p, lr=0.1))
    for step in range(9):
        twin.step(optimizer, step)
    again, other = made()
    again.load_state_dict(module.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for step in range(9, 14):
        for trained, stepped in ((module, optimizer), (again, other)):
            feed(trained, step)
            stepped.step()
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), again.parameters(), strict=True))


class Attribute(Own):
    steps = 0

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        self.steps += 1
        p -= group["lr"] / self.steps * g


class InGroup(Own):
    defaults_of_class = {"k": 0}  # noqa: RUF012

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        group["k"] += 1
        p -= group["lr"] / group["k"] * g


class Noisy(Own):
    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p -= group["lr"] * (g + torch.randn_like(p))


class OddShape(Own):
    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["norms"] = torch.zeros(3)


class InList(Own):
    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["history"] = [g]


class EightBits(Own):
    """Few bits for large parameters only, as libraries do."""

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["m"] = g.to(torch.int8 if p.numel() >= 4096 else p.dtype)


class NameTaken(Own):
    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["master"] = p.clone()


class NoRate(torch.optim.Optimizer):
    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (torch.optim.LBFGS, "torch.optim.LBFGS cannot be run over slices: its step.. needs a closure"),
        (torch.optim.SparseAdam, "does not support dense gradients.*; use another class"),
        (
            torch.optim.Muon,
            r"cannot train 'position' of shape \[1, 5, 8\]: .*only supports 2D parameters.*; freeze such",
        ),
        (GlobalNorm, "its update of one parameter depends on the others"),
        (Noisy, "its update of one parameter depends on the others, or is random"),
        (Attribute, "it keeps something from step to step that is not in its state"),
        (InGroup, r"it keeps numbers that change \(k\) in its parameter groups"),
        (OddShape, r"its state 'norms' .* is a Tensor of shape \[3\]"),
        (InList, "its state 'history' .* is a <class 'list'>"),
        (EightBits, "it keeps states of large parameters in another form or dtype"),
        (NameTaken, "keeps a state 'master', a name that chunkft_fx uses"),
        (NoRate, 'has no option "lr"'),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_changes(kind: Any, reason: str) -> None:
    module = compiled(net(torch.bfloat16), 4)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    generator = torch.get_rng_state()
    with pytest.raises(OptimizerNotSupported, match=reason):
        chunkft_fx.optimizer(module, kind)
    assert module._training.optimizer is None
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())


@pytest.mark.parametrize("kind", [torch.optim.Adam([nn.Parameter(torch.ones(1))]), chunkft_fx.AdamW, dict])
def test_what_is_no_class_of_torch_optimizers_is_refused(kind: Any) -> None:
    with pytest.raises(OptionError, match="is not a class of torch optimizers"):
        chunkft_fx.optimizer(compiled(net()), kind)


def test_muon_runs_where_all_parameters_are_matrices() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    module = compiled(model, 2)
    optimizer = chunkft_fx.optimizer(module, torch.optim.Muon, lr=0.1)
    assert optimizer.spec.is_whole
    twin = SliceTwin(module, lambda p: torch.optim.Muon(p, lr=0.1))
    for step in range(5):
        twin.step(optimizer, step)


def test_hooks_of_all_optimizers_see_one_step() -> None:
    module = compiled(net(), 3)
    optimizer = chunkft_fx.optimizer(module, torch.optim.Adam)
    seen: list[object] = []
    remove: Callable[[], None] = register_optimizer_step_post_hook(lambda stepped, *_: seen.append(stepped)).remove
    try:
        feed(module, 0)
        optimizer.step()
    finally:
        remove()
    assert seen == [optimizer]


def test_states_in_8_bits_have_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EightBits, "__module__", "torchao.optim.adam")
    with pytest.raises(OptimizerNotSupported, match=r'use chunkft_fx.AdamW\(model, state_dtype="8bit"\)'):
        chunkft_fx.optimizer(compiled(net()), EightBits, lr=0.02)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("library", "name"),
    [("torchao.optim", "AdamW8bit"), ("bitsandbytes.optim", "AdamW8bit"), ("bitsandbytes.optim", "Adam8bit")],
)
def test_states_in_8_bits_of_other_libraries_name_those_of_this_one(library: str, name: str) -> None:
    kind = getattr(pytest.importorskip(library), name)
    with pytest.raises(OptimizerNotSupported, match=r'use chunkft_fx.AdamW\(model, state_dtype="8bit"\)'):
        chunkft_fx.optimizer(compiled(net()), kind)


def test_a_parameter_of_a_new_form_is_refused_or_followed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for linear in model:
        linear.bias.requires_grad_(False)
    for kind in (torch.optim.Muon, torch.optim.Adam):
        module = compiled(model)
        optimizer: Any = chunkft_fx.optimizer(module, kind)
        model[0].bias.requires_grad_(True)
        if kind is torch.optim.Muon:
            with pytest.raises(OptimizerNotSupported, match=r"Muon cannot train '0.bias' of shape \[8\]"):
                module(torch.ones(1, 8))
            model[0].bias.requires_grad_(False)
            del module, optimizer
            continue
        module(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        assert len(optimizer.state_dict()["state"]) == 3

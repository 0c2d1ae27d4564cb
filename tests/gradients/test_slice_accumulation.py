"""What autograd does with gradients on their way to parameters: sums, hooks, outside uses, as with dense ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chunkft_fx.errors import SliceGradientError
from chunkft_fx.gradients.slice_gradient import SliceGradient, part_of
from chunkft_fx.module.module import CompiledModule
from tests.support.small_net import compiled

Gradients = dict[str, Tensor]


class Tied(nn.Module):
    """Token embeddings that are the output layer's weight as well, and a layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.layer = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, ids: Tensor | None = None, embeds: Tensor | None = None) -> Tensor:
        x = self.embed(ids) if embeds is None else embeds
        return nn.functional.linear(self.norm(x + torch.tanh(self.layer(x))), self.embed.weight).float().square().mean()


def models(dtype: torch.dtype = torch.float32, chunks: int = 3) -> tuple[CompiledModule, Tied]:
    """The same weights, compiled and plain."""
    torch.manual_seed(1)
    model = Tied().to(dtype)
    return compiled(copy.deepcopy(model), chunks), model


def ids(seed: int) -> Tensor:
    return torch.randint(0, 10, (3, 4), generator=torch.Generator().manual_seed(seed))


def dense(model: nn.Module, loss: Tensor) -> Gradients:
    """The plain model's gradients of one loss, wide, zero where there are none."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    wide = [torch.promote_types(p.dtype, torch.float32) for p in parameters]
    return {
        n: torch.zeros_like(p, dtype=w) if g is None else g.to(w)
        for n, p, g, w in zip(names, parameters, found, wide, strict=True)
    }


def assert_slices_of(module: CompiledModule, *terms: Gradients) -> None:
    """Each active slice holds the sum of these in its place, in the parameter's own ``.grad``; the others hold none."""
    active = {s.name: s for s in module.active_slices()}
    for name, p in module.named_parameters():
        if name not in active:
            assert p.grad is None, name
            continue
        s = active[name]
        want = part_of(sum((t[name] for t in terms[1:]), terms[0][name]), s.slice)
        assert p.grad is not None and s.grad is not None and want is not None
        assert p.grad.shape == p.shape
        assert isinstance(p.grad, SliceGradient) != s.slice.is_whole
        assert s.grad.dtype == p.grad.dtype == want.dtype
        rtol = {torch.float32: 1e-5, torch.float64: 1e-12}.get(p.dtype, 2e-2)
        torch.testing.assert_close(s.grad, want, rtol=rtol, atol=rtol * float(want.abs().max()), msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gradients_add_up_over_micro_batches_in_a_wide_dtype(dtype: torch.dtype) -> None:
    module, plain = models(dtype)
    terms = [dense(plain, plain(ids(seed))) for seed in range(4)]
    for chunk in range(3):
        module.activate(chunk)
        assert_no_gradient(module)
        for seed in range(3):
            module(ids(seed)).backward()
        assert_slices_of(module, *terms[:3])
        both = module(ids(3))
        both.backward(retain_graph=True)
        both.backward()
        assert_slices_of(module, *terms, terms[3])


def assert_no_gradient(module: CompiledModule) -> None:
    assert all(p.grad is None for p in module.parameters())


Use = Callable[[Any], Tensor]
OUTSIDE: list[Use] = [
    lambda m: sum((p.square().sum() for p in m.parameters()), torch.zeros(())),
    lambda m: m.embed(ids(7)).float().pow(3).sum(),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_from_outside_of_the_call_count_in_active_slices_and_nowhere_else(dtype: torch.dtype) -> None:
    module, plain = models(dtype)
    through = dense(plain, plain(ids(0)))
    for chunk in range(3):
        for use in OUTSIDE:
            outside = dense(plain, use(plain))
            module.activate(chunk)
            for losses in (
                [lambda m: m(ids(0)), use],
                [use, lambda m: m(ids(0))],
                [lambda m, use=use: m(ids(0)) + use(m)],
                [lambda m, use=use: use(m) + m(ids(0))],
            ):
                module.zero_grad()
                for loss in losses:
                    loss(module).backward()
                touched = {s.name for s in module.active_slices()}
                assert touched
                assert_slices_of(module, through, outside)


# Dynamo looks at ``.grad`` of what it is given, a leaf or not
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_embeddings_that_the_caller_looked_up_get_both_parts_of_their_gradient() -> None:
    module, plain = models()
    want = dense(plain, plain(embeds=plain.embed(ids(0))))
    for chunk in range(3):
        module.activate(chunk)
        module(embeds=module.embed(ids(0))).backward()
        assert_slices_of(module, want)


def test_hooks_see_and_change_what_a_parameter_gets() -> None:
    module, plain = models()
    want = dense(plain, plain(ids(0)))
    seen: dict[str, list[Tensor]] = {"before": [], "after": []}
    part = next(s for s in module.active_slices() if not s.slice.is_whole)

    def double(gradient: Tensor) -> Tensor:
        seen["before"].append(gradient)
        return gradient * 2

    def halve(p: Tensor) -> None:
        assert p.grad is not None
        seen["after"].append(p.grad)
        p.grad.mul_(0.25)

    handles = [part.parameter.register_hook(double), part.parameter.register_post_accumulate_grad_hook(halve)]
    module(ids(0)).backward()
    assert all(isinstance(g, SliceGradient) for found in seen.values() for g in found)
    assert [len(found) for found in seen.values()] == [1, 1]
    assert_slices_of(module, {n: g * (0.5 if n == part.name else 1) for n, g in want.items()})
    for handle in handles:
        handle.remove()
    module.zero_grad()
    module(ids(0)).backward()
    assert_slices_of(module, want)


def test_a_hook_that_needs_the_whole_gradient_is_refused_and_nothing_is_handed_over() -> None:
    module, _ = models()
    part = next(s for s in module.active_slices() if not s.slice.is_whole)
    handle = part.parameter.register_hook(lambda g: g.mean(0))
    with pytest.raises(SliceGradientError, match=part.name):
        module(ids(0)).backward()
    assert part.grad is None
    handle.remove()


def test_hooks_of_inactive_parameters_hear_of_nothing_from_the_call() -> None:
    module, _ = models()
    active = {s.name for s in module.active_slices()}
    called: list[str] = []
    for name, p in module.named_parameters():
        if name not in active:
            p.register_hook(lambda g, name=name: called.append(name))
    assert len(active) < len(list(module.parameters()))
    module(ids(0)).backward()
    assert not called


def test_autograd_grad_returns_slice_gradients_and_leaves_grad_alone() -> None:
    module, plain = models(torch.bfloat16)
    want = dense(plain, plain(ids(0)))
    active = {s.name: s for s in module.active_slices()}
    found = torch.autograd.grad(module(ids(0)), list(module.parameters()), allow_unused=True)
    assert_no_gradient(module)
    for (name, p), g in zip(module.named_parameters(), found, strict=True):
        assert (g is not None) == (name in active)
        if g is not None:
            p.grad = g
    assert_slices_of(module, want)
    norm = nn.utils.clip_grad_norm_(module.parameters(), 1e-3)
    factor = 1e-3 / (float(norm) + 1e-6)
    assert factor < 1
    assert_slices_of(module, {n: g * factor for n, g in want.items()})


def test_gradients_to_inputs_are_whole() -> None:
    module, plain = models()
    x, y = (plain.embed(ids(0)).detach().requires_grad_() for _ in range(2))
    module(embeds=x).backward()
    plain(embeds=y).backward()
    assert x.grad is not None and y.grad is not None
    torch.testing.assert_close(x.grad, y.grad)

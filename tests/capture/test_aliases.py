"""Outputs that share memory with each other, an input, a weight or a buffer: gradients add up as in the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import chunkft_fx
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.torch_internals import tree_leaves
from tests.support.forced_streaming import streaming


class Net(nn.Module):
    """Returns what ``results(self, h, x)`` makes of its hidden value ``h`` and its input."""

    running: Tensor

    def __init__(self, results: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.norm, self.scale = nn.Linear(6, 6), nn.LayerNorm(6), nn.Parameter(torch.randn(6))
        self.register_buffer("running", torch.zeros(3, 4, 6))
        self.results = results

    def forward(self, x: Tensor) -> Any:
        return self.results(self, self.norm(self.linear(x)) * self.scale, x)


def changed_in_place(net: Net, h: Tensor, x: Tensor) -> Any:
    return h, h.mul_(2.0), h.view(-1)


def view_of_mutated_buffer(net: Net, h: Tensor, x: Tensor) -> Any:
    net.running.add_(h.detach())
    return h.sum(), net.running.view(-1), net.running[0]


def sum_with_mutated_buffer(net: Net, h: Tensor, x: Tensor) -> Any:
    net.running.mul_(0.5).add_(1.0)
    return h, (h + net.running)[:, 0], net.running


CASES: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "view": lambda net, h, x: (h, h.view(-1)),
    "view first": lambda net, h, x: (h.view(-1), h),
    "two views": lambda net, h, x: (h[:, :2], h.transpose(0, 1)),
    "overlapping views": lambda net, h, x: (h[:, 1:], h[:, :-1], h),
    "pooled first token": lambda net, h, x: {"all": h, "first": h[:, 0]},
    "pieces": lambda net, h, x: h.unbind(1),
    "chunks beside the whole": lambda net, h, x: (*h.chunk(2, -1), h),
    "twice the same": lambda net, h, x: (h, h),
    "expanded": lambda net, h, x: (h, h[:1].expand(3, 4, 6)),
    "detached": lambda net, h, x: (h, h.detach()),
    "detached first": lambda net, h, x: (h.detach(), h),
    "detached view": lambda net, h, x: (h.detach()[:, 0], h[:, 0], h),
    "loss and its log": lambda net, h, x: {"loss": h.pow(2).mean(), "log": h.pow(2).mean().detach()},
    "one loss, logged": lambda net, h, x: (lambda loss: {"loss": loss, "log": loss.detach()})(h.pow(2).mean()),
    "changed in place": changed_in_place,
    "view of the input": lambda net, h, x: (h, x.view(-1), x[:, 0]),
    "the input": lambda net, h, x: (h, x),
    "view of a weight": lambda net, h, x: (h, net.linear.weight.view(-1), net.scale[2:]),
    "transposed weight": lambda net, h, x: (h, net.linear.weight.t()),
    "detached weight": lambda net, h, x: (h, net.linear.weight.detach()),
    "view of a mutated buffer": view_of_mutated_buffer,
    "a mutated buffer": sum_with_mutated_buffer,
    "integers beside": lambda net, h, x: (h, h.argmax(-1), h.argmax(-1).view(-1)),
}


def tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def losses(result: Any) -> list[Tensor]:
    """A loss for each output that has a gradient, all different."""
    learning = [o for o in tensors(result) if o.requires_grad]
    return [(i + 1) * (o - 0.3).pow(2).sum() for i, o in enumerate(learning)]


def gradients(compiled: CompiledModule) -> dict[str, Tensor]:
    return {s.name: s.grad for s in compiled.active_slices() if s.grad is not None}


def compare(results: Callable[[Any, Tensor, Tensor], Any], used: Callable[[Sequence[Tensor]], Tensor]) -> None:
    model, x = Net(results), torch.randn(3, 4, 6)
    compiled = chunkft_fx.compile(copy.deepcopy(model), "1GB", chunks=1, backend="eager")
    plain_x, own_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    plain, ours = model(plain_x), compiled(own_x)
    for a, b in zip(tensors(plain), tensors(ours), strict=True):
        torch.testing.assert_close(b, a, msg=lambda text: f"value: {text}")
        assert a.requires_grad == b.requires_grad
    used(losses(plain)).backward()
    used(losses(ours)).backward()
    torch.testing.assert_close(own_x.grad, plain_x.grad)
    dense = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients(compiled).keys() == dense.keys()
    for name, gradient in gradients(compiled).items():
        torch.testing.assert_close(gradient, dense[name])
    for (name, buffer), own in zip(model.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(own, buffer, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_gradients_through_all_outputs_add_up(name: str) -> None:
    compare(CASES[name], lambda parts: torch.stack(list(parts)).sum())


@pytest.mark.parametrize("name", ["pooled first token", "two views", "chunks beside the whole"])
def test_a_gradient_through_the_last_output_alone_arrives(name: str) -> None:
    compare(CASES[name], lambda parts: parts[-1])
    compare(CASES[name], lambda parts: parts[0])


def test_identities_are_the_plain_models() -> None:
    model = Net(lambda net, h, x: (h, h, x, net.scale, net.running))
    compiled = chunkft_fx.compile(model, "1GB", chunks=1, backend="eager")
    x = torch.randn(3, 4, 6)
    first, second, given, weight, buffer = compiled(x)
    assert first is second
    assert given is x
    assert weight is model.scale
    assert buffer is model.running


def test_views_of_streamed_weights_keep_their_values() -> None:
    """In training and in evaluation: no output lies in a buffer that the next weight is fetched into."""
    model = Net(lambda net, h, x: (h, net.linear.weight.detach(), net.scale[2:], net.norm.weight.view(2, 3).detach()))
    compiled = chunkft_fx.compile(copy.deepcopy(model), "1GB", chunks=1, backend="eager")
    x = torch.randn(3, 4, 6)
    with streaming("all"):
        results = [compiled(x)]
        with torch.no_grad():
            results.append(compiled.eval()(x))
        compiled.train()(x)[0].sum().backward()
    ring = compiled._training.engines._ring
    assert ring is not None
    buffers = {b.untyped_storage().data_ptr() for b in ring._buffers}
    for result in results:
        assert buffers.isdisjoint(o.untyped_storage().data_ptr() for o in result)
        for a, b in zip(model(x), result, strict=True):
            torch.testing.assert_close(b, a)


@pytest.mark.slow
def test_inductor_keeps_outputs_apart() -> None:
    model, x = Net(CASES["chunks beside the whole"]), torch.randn(3, 4, 6)
    compiled = chunkft_fx.compile(copy.deepcopy(model), "1GB", chunks=1)
    torch.stack(losses(model(x))).sum().backward()
    torch.stack(losses(compiled(x))).sum().backward()
    for name, gradient in gradients(compiled).items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


def clones(compiled: CompiledModule) -> list[fx.Node]:
    graph = compiled._training.sessions[-1].capture.graph
    return [n for n in graph.nodes if n.target is torch.ops.aten.clone.default]


def test_only_what_shares_memory_is_copied() -> None:
    x = torch.randn(3, 4, 6)
    apart = chunkft_fx.compile(Net(lambda net, h, x: (h.mean(), h)), "1GB", chunks=1, backend="eager")
    apart(x)
    assert not clones(apart)
    pooled = chunkft_fx.compile(Net(CASES["pooled first token"]), "1GB", chunks=1, backend="eager")
    pooled(x)
    (clone,) = clones(pooled)
    assert tuple(clone.meta["val"].shape) == (3, 6)
    pooled.eval()
    with torch.no_grad():
        pooled(x)
    assert not clones(pooled)

"""What a forward may do beside computing: change inputs and buffers, draw, return anything; and lazy modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import chunkft_fx
from chunkft_fx import errors
from tests.module.test_unusual_values import made, plain, slow
from tests.support.equivalence import assert_same_gradients, dense_gradients
from tests.support.odd_blocks import WIDTH, Block, Blocks, assert_trains_exactly, blocks_of, compiled, rows

Step = Callable[[Any, Tensor], Tensor]


class Counting(Block):
    """Counts calls, and keeps a mean and a copy of what it saw, in buffers of three kinds."""

    calls: Tensor
    mean: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__(plain)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.ones(WIDTH))
        self.register_buffer("last", torch.ones(WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        self.calls += 1
        self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        self.last = self.last * 0.5 + h.detach()[0]
        return self.b(self.a(h) * self.mean).sin_() * self.calls


def test_buffers_that_forward_writes_end_as_in_the_plain_model() -> None:
    model = made(Counting)
    want = copy.deepcopy(model)
    module = compiled(model)
    for _ in range(2):
        want(**rows()).backward()
        module(**rows()).backward()
    assert {n for n, _ in module.named_buffers()} == {n for n, _ in want.named_buffers()}
    for name, buffer in want.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), buffer, rtol=1e-12, atol=0)
    for s in module.active_slices():
        torch.testing.assert_close(s.grad, want.get_parameter(s.name).grad, rtol=1e-9, atol=1e-12)


class Writing(Blocks):
    """Doubles its input where it lies, and notes the loss in another."""

    def forward(self, x: Tensor, note: Tensor) -> Tensor:  # type: ignore[override]
        x.mul_(2)
        loss = self.body(self.first(x)).square().sum()
        note[0] = loss.detach()
        return loss


def test_inputs_that_forward_writes_are_written_once() -> None:
    model = made(lambda: Block(plain), Writing)
    given = {**rows(), "note": torch.zeros(2, dtype=torch.float64)}
    ours, theirs = copy.deepcopy(given), copy.deepcopy(given)
    model(**theirs).backward()
    module = compiled(model)
    module(**ours).backward()
    for name in given:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=0)
    for s in module.active_slices():
        torch.testing.assert_close(s.grad, model.get_parameter(s.name).grad, rtol=1e-9, atol=1e-12)


def noise(block: Any, h: Tensor) -> Tensor:
    g = functional.dropout(block.a(h), 0.5) + torch.rand_like(h) + torch.bernoulli(h.sigmoid())
    return block.b(g) + torch.randn(WIDTH, dtype=h.dtype)


def leaky(block: Any, h: Tensor) -> Tensor:
    return block.b(functional.rrelu(block.a(h), training=True))


def gumbel(block: Any, h: Tensor) -> Tensor:
    return block.b(functional.gumbel_softmax(block.a(h), hard=True))


def sampled(block: Any, h: Tensor) -> Tensor:
    g = block.a(h)
    return block.b(g) * g.gather(1, torch.multinomial(g.softmax(-1), 2)).sum(1, keepdim=True)


@pytest.mark.parametrize("step", slow(noise, leaky, gumbel, sampled))
def test_draws_are_those_of_the_plain_model_under_one_seed(step: Step) -> None:
    assert_trains_exactly(blocks_of(step), rows())


class Talkative(Blocks):
    """Returns numbers, text, nothing, whole numbers and masks beside its loss."""

    def forward(self, x: Tensor) -> dict[str, Any]:  # type: ignore[override]
        loss = super().forward(x)
        return {
            "loss": loss, "half": (loss / 2, [x.sum(), None]), "best": x.argmax(-1), "mask": x > 0, "n": 3, "rate": 0.5,
            "name": "talkative",
        }  # fmt: skip


def test_a_forward_may_return_anything() -> None:
    model = made(lambda: Block(plain), Talkative)
    module = compiled(model, 2)
    want, got = model(**rows()), module(**rows())
    assert list(got) == list(want)
    assert got["n"] == 3 and got["rate"] == 0.5 and got["name"] == "talkative" and got["half"][1][1] is None
    for name in ("loss", "best", "mask"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=0)
    for result in (want, got):
        (result["loss"] + result["half"][0]).backward()
    for s in module.active_slices():
        whole = model.get_parameter(s.name).grad
        assert whole is not None and s.grad is not None
        part = whole if s.slice.is_whole else whole.narrow(s.dim, s.start, s.length)
        torch.testing.assert_close(s.grad, part, rtol=1e-9, atol=1e-12)


class Lazy(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.last = layer, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x).sin()).square().sum()


LAZY: list[Callable[[], nn.Module]] = [
    lambda: nn.LazyLinear(WIDTH),
    nn.LazyBatchNorm1d,
    lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.LazyLinear(WIDTH)),
]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("chunks", [2, "auto"])
@pytest.mark.parametrize("make", LAZY)
def test_a_lazy_module_is_refused_until_it_was_called(make: Callable[[], nn.Module], chunks: Any) -> None:
    model = Lazy(make())
    with pytest.raises(errors.UninitializedParameters, match=r"parameter layer\..*call the plain model once"):
        chunkft_fx.compile(model, "1GB", chunks=chunks, interval=1, backend="eager")
    model = model.double()
    model(**rows())
    assert_same_gradients(compiled(model, 2), model, rows(), 1e-9)


class Nested(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x.values()).square().sum()


def test_an_input_made_of_several_tensors_is_refused_by_name() -> None:
    parts = [torch.randn(n, WIDTH, dtype=torch.float64) for n in (2, 3)]
    batch = {"x": torch.nested.nested_tensor(parts, layout=torch.jagged)}
    module = compiled(made(lambda: Block(plain), Nested))
    with pytest.raises(errors.UnsupportedGraph, match="pass its parts as plain tensors"):
        module(**batch)


class Renormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, WIDTH, max_norm=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x).square().sum()


def test_a_weight_that_forward_writes_is_refused_by_name() -> None:
    module = compiled(Renormed())
    before = module.get_parameter("table.weight").detach().clone()
    with pytest.raises(errors.UnsupportedGraph, match=r"writes the weight table\.weight"):
        module(x=torch.tensor([1, 2]))
    assert torch.equal(before, module.get_parameter("table.weight"))


def test_a_graph_break_names_the_users_file_and_line() -> None:
    def breaking(block: Any, h: Tensor) -> Tensor:
        return block.b(h) if h.sum() > 0 else block.a(h)

    with pytest.raises(errors.UnsupportedGraph, match=r"test_unusual_calls\.py"):
        compiled(blocks_of(breaking))(**rows())


def test_a_weight_that_the_batch_does_not_use_has_no_gradient() -> None:
    model = made(lambda: Block(lambda block, h: block.b(h)))
    assert not dense_gradients(model, rows())[1]["layers.0.a.weight"].any()
    assert_trains_exactly(model, rows())

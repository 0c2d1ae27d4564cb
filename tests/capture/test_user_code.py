"""Every refusal of a model's code names the file and the line of that code."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op
from torch._subclasses.fake_tensor import FakeTensorMode

import chunkft_fx
from chunkft_fx.capture.capture import _lift_constants
from chunkft_fx.capture.user_code import naming_the_forward_line, where, where_in
from chunkft_fx.errors import UnsupportedGraph


@torch.library.custom_op("chunkft_places::without_gradient", mutates_args=())
def without_gradient(x: Tensor) -> Tensor:
    return x * 2


@without_gradient.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("chunkft_places::without_fake", mutates_args=())
def without_fake(x: Tensor) -> Tensor:
    return x * 2


@torch.library.custom_op("chunkft_places::note", mutates_args=())
def note(x: Tensor) -> None:
    """An operator with a side effect."""


@note.register_fake
def _(x: Tensor) -> None:
    return None


@torch.library.custom_op("chunkft_places::noted", mutates_args=())
def noted(x: Tensor) -> Tensor:
    return x * 2


@noted.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _note_gradient(ctx: Any, gradient: Tensor) -> Tensor:
    note(gradient)
    return gradient * 2


noted.register_autograd(_note_gradient)


class _Cropped(torch.autograd.Function):
    """A defect: its gradient has another shape than its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient[:1]


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.table = nn.Embedding(4, 4, max_norm=1.0)
        self.register_buffer("kept", torch.zeros(4))


class BranchOnData(_Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.sum() > 0:  # here
            y = y + 1
        return self.b(y).sum()


class BranchOnNumberFromData(_Model):
    def forward(self, x: Tensor) -> Tensor:
        n = self.a(x).argmax().item()
        return self.b(x).sum() * (2 if n > 2 else 1)  # here


class WrongShapes(_Model):
    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) @ torch.ones(3)).sum()  # here


class OperatorWithoutFake(_Model):
    def forward(self, x: Tensor) -> Tensor:
        y = without_fake(self.a(x))  # here
        return y.sum()


class OperatorWithoutGradient(_Model):
    def forward(self, x: Tensor) -> Tensor:
        y = without_gradient(self.a(x))  # here
        return self.b(y).sum()


class WrongGradient(_Model):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Cropped.apply(self.a(x))  # type: ignore[no-untyped-call]  # here
        return self.b(y).sum()


class NeededValueOverwritten(_Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).exp()  # here
        y.mul_(2)
        return y.sum()


class BufferWrittenWithGradient(_Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.kept.add_(y.sum(0))  # type: ignore[operator]  # here
        return (self.b(y) * self.kept).sum()


class WeightWritten(_Model):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.b.weight.mul_(0.5)  # here
        return self.b(self.a(x)).sum()


class WeightClipped(_Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return (self.table(torch.tensor([0, 1])) @ y.T).sum()  # here


class NestedOutput(_Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return torch.nested.nested_tensor_from_jagged(y, torch.tensor([0, 2, 4]))  # here


class EffectInBackward(_Model):
    def forward(self, x: Tensor) -> Tensor:
        y = noted(self.a(x))  # here
        return self.b(y).sum()


@pytest.fixture(autouse=True)
def _ordered() -> Iterator[None]:
    handle = _register_effectful_op("chunkft_places::note", _EffectType.ORDERED)
    yield
    handle.destroy()


MODELS: tuple[type[_Model], ...] = (
    BranchOnData, BranchOnNumberFromData, WrongShapes, OperatorWithoutFake, OperatorWithoutGradient, WrongGradient,
    NeededValueOverwritten, BufferWrittenWithGradient, WeightWritten, WeightClipped, NestedOutput, EffectInBackward,
)  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_a_refusal_names_the_line(kind: type[_Model]) -> None:
    lines, first = inspect.getsourcelines(kind)
    (line,) = [first + i for i, text in enumerate(lines) if "# here" in text]
    compiled = chunkft_fx.compile(kind(), "1GB", chunks=1, backend="eager")
    with pytest.raises(UnsupportedGraph, match=re.escape(f" ({__file__}, line {line}: ")):
        compiled(torch.randn(4, 4))


class NestedInput(_Model):
    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()  # here
        return self.a(y.values()).sum()


def test_an_input_made_of_several_tensors_names_its_first_use() -> None:
    lines, first = inspect.getsourcelines(NestedInput)
    (line,) = [first + i for i, text in enumerate(lines) if "# here" in text]
    batch = torch.nested.nested_tensor([torch.randn(n, 4) for n in (2, 3)], layout=torch.jagged)
    compiled = chunkft_fx.compile(NestedInput(), "1GB", chunks=1, backend="eager")
    with pytest.raises(UnsupportedGraph, match=re.escape(f" ({__file__}, line {line}: ")):
        compiled(batch)


def test_an_operand_that_is_no_tensor_names_the_line_that_uses_it() -> None:
    graph = fx.Graph()
    operand = graph.get_attr("settings")
    user = graph.call_function(torch.ops.aten.neg.default, (operand,))
    user.meta["stack_trace"] = '  File "model.py", line 7, in forward\n    y = odd(x)\n'
    graph.output((user,))
    root = nn.Module()
    root.settings = "no tensor"  # type: ignore[assignment]
    with pytest.raises(UnsupportedGraph, match=r"takes str settings \(model\.py, line 7: y = odd\(x\)\)"):
        _lift_constants(fx.GraphModule(root, graph), FakeTensorMode())


def test_frames_of_torch_are_passed_over() -> None:
    frame = '  File "{}", line 3, in forward\n    return self.linear(x)\n'
    text = frame.format("model.py") + frame.format(torch.nn.functional.__file__)
    assert where_in(text) == " (model.py, line 3: return self.linear(x))"
    assert where_in(frame.format(torch.__file__)) == ""
    assert where_in("no frame") == ""


def test_a_node_without_a_line_has_that_of_its_first_reader() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert where(x) == ""
    for line in (5, 6):
        graph.call_function(torch.neg, (x,)).meta["stack_trace"] = f'File "m.py", line {line}, in f\n  -x\n'
    assert where(x) == " (m.py, line 5: -x)"


def test_other_warnings_of_a_trace_are_given_on() -> None:
    with pytest.warns(DeprecationWarning, match="old"), naming_the_forward_line():
        warnings.warn("old", DeprecationWarning, stacklevel=2)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), ValueError("no line is known"), UnsupportedGraph()])
def test_other_errors_of_a_trace_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, naming_the_forward_line():
        raise error
    assert caught.value is error

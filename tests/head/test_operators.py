"""The chunked head equals autograd of the plain formula, whatever is asked of it, and holds one block of logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from chunkft_fx.head import operators as head
from chunkft_fx.head.memory import blocks, head_workspace, repeated_nbytes
from tests.support.live_storages import LiveStorages

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class Case:
    """Inputs of a head and its settings; ``bias`` may be None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    ignore_index: int
    label_smoothing: float
    mean: bool

    @property
    def operands(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments of the operator."""
        return (
            self.hidden, self.weight, self.bias, self.labels, self.ignore_index, self.label_smoothing, self.mean
        )  # fmt: skip

    @property
    def plain_args(self) -> tuple[Any, ...]:
        """The same for operators that have no derivative themselves."""
        return tuple(a.detach() if isinstance(a, Tensor) else a for a in self.args)

    def formula(self) -> Tensor:
        """The formula that the operator stands for, in torch's own operators."""
        return functional.cross_entropy(
            functional.linear(self.hidden, self.weight, self.bias), self.labels, ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing, reduction="mean" if self.mean else "sum",
        )  # fmt: skip


def make(
    tokens: int,
    classes: int,
    features: int,
    *,
    dtype: torch.dtype = torch.float64,
    bias: bool = False,
    ignored: float = 0.2,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mean: bool = True,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (tokens,), generator=g)
    labels[torch.rand(tokens, generator=g) < ignored] = ignore_index

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    operands = randn(tokens, features), randn(classes, features), randn(classes) if bias else None
    return Case(*operands, labels, ignore_index, label_smoothing, mean)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal to the tolerance of the dtype, relative to the largest element of a finite reference."""
    assert found.dtype == expected.dtype
    finite = expected.detach()[expected.isfinite()]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype] * scale, equal_nan=True)


def few_tokens_a_block(monkeypatch: pytest.MonkeyPatch, case: Case, tokens: int) -> None:
    monkeypatch.setattr(head, "LOGITS_NBYTES", tokens * case.weight.shape[0] * case.weight.element_size())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=60)
@given(data=st.data())
def test_loss_and_gradients_equal_autograd(dtype: torch.dtype, data: st.DataObject) -> None:
    """Any number of tokens, blocks that do and do not divide it, all settings, and a tangent other than 1."""
    draw = data.draw
    classes = draw(st.integers(1, 9))
    case = make(
        draw(st.integers(0, 11)), classes, draw(st.integers(1, 5)), dtype=dtype, bias=draw(st.booleans()),
        ignored=draw(st.sampled_from([0.0, 0.3, 1.0])), ignore_index=draw(st.sampled_from([-100, 0, classes - 1])),
        label_smoothing=draw(st.sampled_from([0.0, 0.1, 1.0])), mean=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        few_tokens_a_block(patch, case, draw(st.integers(1, 12)))
        loss, expected = head.forward(*case.args), case.formula()
        assert_close(loss, expected, dtype)
        tangent = torch.tensor(draw(st.sampled_from([1.0, -2.5])), dtype=dtype)
        found = torch.autograd.grad(loss, case.operands, tangent)
        for a, b in zip(found, torch.autograd.grad(expected, case.operands, tangent), strict=True):
            assert_close(a, b, dtype)


def test_on_the_cpu_one_block_is_torchs_to_the_bit() -> None:
    """The same operators in the same order, so that a training run does not drift from the plain model's."""
    case = make(24, 160, 64, dtype=torch.float32)
    loss, *found = head.grad(*case.plain_args, [True, True, False])
    assert torch.equal(loss, case.formula())
    for a, b in zip(found, torch.autograd.grad(case.formula(), case.operands), strict=False):
        assert torch.equal(a, b)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mean", [True, False])
def test_all_labels_ignored(mean: bool, label_smoothing: float) -> None:
    """torch's mean of nothing is nan, its gradient zero; its sum of nothing is zero."""
    case = make(5, 7, 3, ignored=1.0, mean=mean, label_smoothing=label_smoothing, bias=True)
    loss = head.forward(*case.args)
    assert torch.equal(loss.isnan(), torch.tensor(mean))
    for a, b in zip(*(torch.autograd.grad(x, case.operands) for x in (loss, case.formula())), strict=True):
        assert not a.any()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tokens", [1, 2, 6, 7])
@pytest.mark.parametrize("window", [(0, 2, 4), (1, 1, 2)])
def test_slices_are_slices_of_the_gradient(
    window: tuple[int, int, int], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(6, 9, 5, bias=True)
    few_tokens_a_block(monkeypatch, case, tokens)
    dim, start, length = window
    d_hidden, d_weight, d_bias = torch.autograd.grad(case.formula(), case.operands)
    asked = (torch.tensor(start), dim, length, torch.tensor(3), 5)
    loss, *found = head.grad(*case.plain_args, [True, True, True], *asked)
    assert_close(loss, case.formula(), torch.float64)
    tangent = torch.tensor(0.5, dtype=torch.float64)
    halves = head.backward(tangent, *case.plain_args, [True, True, True], *asked)
    for a, half, b in zip(
        found, halves, (d_hidden, d_weight.narrow(dim, start, length), d_bias.narrow(0, 3, 5)), strict=True
    ):
        assert_close(a, b, torch.float64)
        assert_close(half, b * 0.5, torch.float64)


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (False, False, True)])
def test_what_is_not_asked_for_is_empty(mask: tuple[bool, bool, bool]) -> None:
    _, *found = head.grad(*make(6, 9, 5, bias=True).plain_args, list(mask))
    assert [t.numel() > 0 for t in found] == list(mask)


def test_low_precision_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a token a block, sums in bf16 would lose half of the digits that one rounding at the end keeps."""
    case = make(512, 8, 4, dtype=torch.bfloat16, mean=False)
    few_tokens_a_block(monkeypatch, case, 1)
    _, _, found, _ = head.grad(*case.plain_args, [False, True, False])
    logits = functional.linear(case.hidden, case.weight).detach().double().requires_grad_()
    loss = functional.cross_entropy(logits, case.labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = gradient.bfloat16().double().t() @ case.hidden.detach().double()
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert float(error) <= 0.5 * torch.finfo(torch.bfloat16).eps


# torch 2.15 reads `grad` of opcheck's own copies, and hides the warning only where warnings are not errors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_operators_are_well_formed() -> None:
    """Schema, fake implementation and autograd registration agree, with symbolic sizes too."""
    case = make(6, 9, 5, bias=True)
    torch.library.opcheck(head.forward, case.args)
    asked = ([True, True, True], torch.tensor(2), 0, 3, torch.tensor(1), 4)
    torch.library.opcheck(head.grad, (*case.plain_args, *asked))
    torch.library.opcheck(head.backward, (torch.ones((), dtype=torch.float64), *case.plain_args, *asked))


def test_a_label_outside_the_classes_is_an_error_on_the_cpu() -> None:
    case = make(4, 3, 2)
    case.labels[1] = 3
    with pytest.raises(RuntimeError, match="out of bounds"):
        head.forward(*case.args)


def test_blocks_hold_a_quarter_of_a_gibibyte() -> None:
    """The published shape: 1024 tokens of 128,256 bf16 logits; and never no token at all."""
    assert head.block_tokens(128_256, 2) == 1024
    assert head.block_tokens(2**30, 4) == 1


def test_flops_are_those_of_the_products() -> None:
    case = make(6, 9, 5)
    args, product = case.plain_args, 2 * 6 * 9 * 5
    third = (torch.tensor(2), 0, 3)
    assert _flops(head.forward, *args) == product
    assert _flops(head.grad, *args, [True, True, False]) == 3 * product
    assert _flops(head.grad, *args, [True, True, False], *third) == 2 * product + product // 3
    assert _flops(head.backward, torch.ones(()), *args, [False, True, False], *third) == product + product // 3


def _flops(target: Any, *args: Any) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        target(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize(("block", "split"), [(8, 1), (32, 1), (96, 1), (128, 4)])
@pytest.mark.parametrize("kind", ["forward", "grad", "slice", "columns", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_workspace_is_what_the_operator_allocates(
    dtype: torch.dtype, kind: str, block: int, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(96, 500, 64, dtype=dtype, bias=kind == "bias")
    few_tokens_a_block(monkeypatch, case, block)
    asked: tuple[Any, ...] = {
        "forward": (),
        "grad": ([True, True, False],),
        "slice": ([True, True, False], torch.tensor(100), 0, 400),
        "columns": ([False, True, False], torch.tensor(3), 1, 32),
        "bias": ([True, True, True],),
    }[kind]
    args = [*case.plain_args, *asked]
    with LiveStorages() as live:
        results = head.loss_and_gradients(*args, split=split)
    node = node_of(head.grad if asked else head.forward, args)
    node.kwargs = {"split": split}
    predicted = head_workspace(node)
    assert blocks(node) == -(-96 // (block // split))
    assert predicted + sum(t.untyped_storage().nbytes() for t in results) == pytest.approx(live.peak_nbytes, rel=0.01)


def node_of(target: Any, args: list[Any]) -> fx.Node:
    """A graph node that calls an operator on placeholders with fake values."""
    graph = fx.Graph()
    mode = FakeTensorMode()
    nodes = []
    for i, a in enumerate(args):
        if not isinstance(a, Tensor):
            nodes.append(a)
            continue
        placeholder = graph.placeholder(f"primals_{i}")
        placeholder.meta["val"] = mode.from_tensor(a)
        nodes.append(placeholder)
    node = graph.call_function(target, tuple(nodes))
    with mode:
        node.meta["val"] = target(*fx.map_arg(nodes, lambda n: n.meta["val"]))
    return node


def test_other_nodes_have_no_workspace_and_no_blocks() -> None:
    other = fx.Graph().call_function(torch.ops.aten.mm.default, ())
    assert (head_workspace(other), repeated_nbytes(other), blocks(other)) == (0, 0, 1)


def test_blocks_read_the_weight_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks: twice more the weight for the logits and for the input gradient, and a sum of half of it."""
    case = make(96, 500, 64, dtype=torch.float32)
    few_tokens_a_block(monkeypatch, case, 32)
    weight = 500 * 64 * 4
    assert repeated_nbytes(node_of(head.forward, list(case.plain_args))) == 2 * weight
    sliced = [*case.plain_args, [True, True, False], torch.tensor(0), 0, 250]
    assert repeated_nbytes(node_of(head.grad, sliced)) == 2 * (2 * weight + weight)


def test_useful_splits_are_those_that_make_blocks_smaller() -> None:
    assert head.useful_splits(8192, 128_256, 2) == (1, 2, 4, 8)
    assert head.useful_splits(512, 128_256, 2) == (1, 4, 8)
    assert head.useful_splits(64, 128_256, 2) == (1,)
    assert [head.block_tokens(128_256, 2, split) for split in head.SPLITS] == [1024, 512, 256, 130]

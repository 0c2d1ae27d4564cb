"""The head of token log-probabilities equals autograd of the plain formulas, and holds one block of logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from chunkft_fx.head import log_probs as head
from chunkft_fx.head import operators
from chunkft_fx.head.memory import blocks, head_workspace
from tests.head.test_operators import TOLERANCE, assert_close, make, node_of
from tests.support.live_storages import LiveStorages

ALL = [True, True, True, True]


def scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    z = scale * functional.linear(hidden, weight, bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def formula(hidden: Tensor, weight: Tensor, bias: Any, labels: Tensor, scale: float, softcap: Any) -> list[Tensor]:
    z = scores(hidden, weight, bias, scale, softcap)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    is_top = z.argmax(-1) == labels
    return [log_p.gather(1, labels[:, None])[:, 0], -(p * log_p).sum(-1), (p * p).sum(-1).log(), z.mean(-1), is_top]


def drawn(tokens: int, classes: int, features: int, **options: Any) -> tuple[list[Tensor], Tensor | None, Tensor]:
    case = make(tokens, classes, features, ignored=0.0, **options)
    return [case.hidden, case.weight], case.bias, case.labels


def blocks_of(patch: pytest.MonkeyPatch, weight: Tensor, tokens: int) -> None:
    nbytes = head.SMALLER * tokens * weight.shape[0] * weight.element_size()
    patch.setattr(operators, "LOGITS_NBYTES", nbytes)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=50)
@given(data=st.data())
def test_values_and_gradients_equal_autograd(dtype: torch.dtype, data: st.DataObject) -> None:
    draw = data.draw
    tokens, features = draw(st.integers(0, 11)), draw(st.integers(1, 5))
    (hidden, weight), bias, labels = drawn(
        tokens, draw(st.integers(1, 9)), features, dtype=dtype, bias=draw(st.booleans()), seed=draw(st.integers(0, 99))
    )
    scale, softcap = draw(st.sampled_from([1.0, 0.5])), draw(st.sampled_from([None, 1.5]))
    wanted = draw(st.lists(st.booleans(), min_size=4, max_size=4))
    args = (hidden, weight, bias, labels, scale, softcap)
    with pytest.MonkeyPatch.context() as patch:
        blocks_of(patch, weight, draw(st.integers(1, 12)))
        found, expected = head.forward(*args, wanted), formula(*args)
        for a, b, is_wanted in zip(found, expected, [True, *wanted], strict=True):
            if is_wanted:
                assert_close(a, b, dtype) if b.dtype != torch.bool else torch.testing.assert_close(a, b)
            else:
                assert a.shape == (0,)
        g = torch.Generator().manual_seed(3)
        tangents = [torch.randn(tokens, generator=g, dtype=dtype) for _ in range(2)]
        differentiable = slice(0, 2 if wanted[0] else 1)
        operands = [t for t in (hidden, weight, bias) if t is not None]
        ours = torch.autograd.grad(found[differentiable], operands, tangents[differentiable])
        theirs = torch.autograd.grad(expected[differentiable], operands, tangents[differentiable])
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b, dtype)


def test_what_has_no_gradient_says_so() -> None:
    """A loss over it is an error of autograd, not a gradient of zero."""
    (hidden, weight), _, labels = drawn(4, 5, 3)
    found = head.forward(hidden, weight, None, labels, 1.0, None, ALL)
    assert [t.requires_grad for t in found] == [True, True, False, False, False]


@pytest.mark.parametrize("window", [(0, 2, 4), (1, 1, 2)])
@pytest.mark.parametrize("tokens", [2, 7])
def test_slices_are_slices_of_the_gradient(
    window: tuple[int, int, int], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hidden, weight), bias, labels = drawn(6, 9, 5, bias=True)
    blocks_of(monkeypatch, weight, tokens)
    args = (hidden, weight, bias, labels, 0.5, 2.0)
    tangent = torch.linspace(-1, 1, 6, dtype=torch.float64)
    operands = [hidden, weight, bias]
    of_hidden, of_weight, of_bias = torch.autograd.grad(
        formula(*args)[0], [t for t in operands if t is not None], tangent
    )
    dim, start, length = window
    with torch.no_grad():
        asked = ([True, True, True], torch.tensor(start), dim, length, torch.tensor(3), 5)
        found = head.backward(tangent, None, *args, *asked)
    expected = of_hidden, of_weight.narrow(dim, start, length), of_bias.narrow(0, 3, 5)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, torch.float64)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_operators_are_well_formed() -> None:
    (hidden, weight), bias, labels = drawn(6, 9, 5, bias=True)
    torch.library.opcheck(head.forward, (hidden, weight, bias, labels, 0.5, None, ALL))
    asked = ([True, True, True], torch.tensor(2), 0, 3, torch.tensor(1), 4)
    plain = [t.detach() if isinstance(t, Tensor) else t for t in (hidden, weight, bias)]
    tangents = [torch.ones(6, dtype=torch.float64)] * 2
    torch.library.opcheck(head.backward, (*tangents, *plain, labels, 0.5, 2.0, *asked))


def test_flops_are_those_of_the_products() -> None:
    (hidden, weight), _, labels = drawn(6, 9, 5)
    args, product = (hidden.detach(), weight.detach(), None, labels, 1.0, None), 2 * 6 * 9 * 5
    with FlopCounterMode(display=False) as counter:
        head.forward(*args, ALL)
    assert counter.get_total_flops() == product
    with FlopCounterMode(display=False) as counter:
        head.backward(torch.ones(6, dtype=torch.float64), None, *args, [True, True, False], torch.tensor(2), 0, 3)
    assert counter.get_total_flops() == 2 * product + product // 3


@pytest.mark.parametrize(("block", "split"), [(8, 1), (96, 1), (128, 4)])
@pytest.mark.parametrize("kind", ["forward", "capped", "backward", "capped backward", "slice", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_workspace_is_what_the_operator_allocates(
    dtype: torch.dtype, kind: str, block: int, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hidden, weight), bias, labels = drawn(96, 500, 64, dtype=dtype, bias=kind == "bias")
    blocks_of(monkeypatch, weight, block)
    operands: list[Any] = [t.detach() if isinstance(t, Tensor) else t for t in (hidden, weight, bias)]
    args = [*operands, labels, 1.0, 3.0 if "capped" in kind else None]
    if kind in ("forward", "capped"):
        target, args = head.forward, [*args, ALL]
    else:
        window = (torch.tensor(100), 0, 400) if kind == "slice" else ()
        mask = [True, True, kind == "bias"]
        target, args = head.backward, [torch.randn(96), torch.randn(96), *args, mask, *window]
    function: Any = head._forward if target is head.forward else head._backward
    with LiveStorages() as live:
        results = function(*args, split=split)
    node = node_of(target, args)
    node.kwargs = {"split": split}
    assert blocks(node) == -(-96 // (block // split))
    made = sum(t.untyped_storage().nbytes() for t in results)
    assert head_workspace(node) + made == pytest.approx(live.peak_nbytes, rel=0.02)

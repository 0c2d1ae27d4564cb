"""The chunked head on CUDA: the kernel against its reference, the operators against autograd, and their memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import chunkft_fx
from chunkft_fx.head import operators as head
from chunkft_fx.head.missing_logits import MissingLogits
from chunkft_fx.tools.zoo import tiny
from tests.kernels.interpreted_cross_entropy import CLASSES, compare
from tests.support.equivalence import assert_same_gradients

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [*CLASSES, 128_256])
def test_kernel_equals_reference(classes: int, dtype: torch.dtype) -> None:
    for rows, smoothing, ignore, size in (
        (1, 0.0, -100, 1.0),
        (5, 0.1, 0, 30.0),
        (64, 1.0, 1, 1.0),
        (0, 0.0, -100, 1.0),
    ):
        compare("cuda", rows, classes, dtype, smoothing, ignore, size)


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, **options: Any) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight, bias).float(), labels, **options)


def operands(tokens: int, classes: int, features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, features, device="cuda", dtype=dtype).requires_grad_()
    weight = (torch.randn(classes, features, device="cuda", dtype=dtype) * features**-0.5).requires_grad_()
    bias = torch.randn(classes, device="cuda", dtype=dtype).requires_grad_()
    labels = torch.randint(0, classes, (tokens,), device="cuda")
    labels[::5] = -100
    return hidden, weight, bias, labels


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("tokens", "block"), [(300, 512), (300, 100), (300, 77)])
def test_float32_equals_autograd(
    tokens: int, block: int, smoothing: float, mean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias, labels = operands(tokens, 1000, 96, torch.float32)
    monkeypatch.setattr(head, "LOGITS_NBYTES", block * 1000 * 4)
    loss = head.forward(hidden, weight, bias, labels, -100, smoothing, mean)
    options = {"label_smoothing": smoothing, "reduction": "mean" if mean else "sum"}
    expected = plain(hidden, weight, bias, labels, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    found = torch.autograd.grad(loss, (hidden, weight, bias))
    for a, b in zip(found, torch.autograd.grad(expected, (hidden, weight, bias)), strict=True):
        assert float((a - b).norm() / b.norm()) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_labels_ignored_on_cuda(dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = operands(40, 500, 32, dtype)
    loss = head.forward(hidden, weight, bias, torch.full_like(labels, -100), -100, 0.0, True)
    assert loss.isnan()
    assert not any(g.any() for g in torch.autograd.grad(loss, (hidden, weight, bias)))


def test_bf16_slices_are_as_near_to_float32_as_eagers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over blocks are taken in float32: no further from the truth than one product over all tokens."""
    hidden, weight, bias, labels = operands(2048, 3000, 256, torch.bfloat16)
    monkeypatch.setattr(head, "LOGITS_NBYTES", 128 * 3000 * 2)
    h, w, b = (t.detach().float().requires_grad_() for t in (hidden, weight, bias))
    wide = torch.autograd.grad(plain(h, w, b, labels), (h, w, b))
    eager = torch.autograd.grad(plain(hidden, weight, bias, labels), (hidden, weight, bias))
    args = (hidden.detach(), weight.detach(), bias.detach(), labels, -100, 0.0, True)
    for dim, start, length in ((0, 1000, 1500), (1, 100, 64)):
        window = (torch.tensor(start), dim, length, torch.tensor(5), 300)
        _, d_hidden, d_weight, d_bias = head.grad(*args, [True, True, True], *window)
        pieces = [(slice(None),), (slice(None),) * dim + (slice(start, start + length),), (slice(5, 305),)]
        for found, near, truth, piece in zip((d_hidden, d_weight, d_bias), eager, wide, pieces, strict=True):
            reference = truth[piece]
            error = float((found.float() - reference).norm() / reference.norm())
            assert error <= 1.1 * float((near[piece].float() - reference).norm() / reference.norm())


def test_peak_is_a_block_of_logits_and_the_results() -> None:
    """The published shape, with a sixteenth of the weight's rows demanded: at most 0.8 GiB above the inputs."""
    hidden, weight, _, labels = operands(8192, 128_256, 4096, torch.bfloat16)
    length = 128_256 // 16
    args = (hidden.detach(), weight.detach(), None, labels, -100, 0.0, True, [True, True, False])
    head.grad(*args, torch.tensor(length), 0, length)  # libraries take their workspace once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    head.grad(*args, torch.tensor(length), 0, length)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 0.8 * 2**30


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_models_train_with_chunked_heads(family: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LOGITS_NBYTES", 7 * 160 * 4)
    model, batch = tiny(family)
    model.cuda()
    compiled = chunkft_fx.compile(copy.deepcopy(model), "8GB", chunks=17, interval=1, backend=backend)
    inputs = {name: value.cuda() for name, value in batch(2, 12, 0).items()}
    assert_same_gradients(compiled, model, inputs, 1e-4)
    assert isinstance(compiled(**inputs).logits, MissingLogits)

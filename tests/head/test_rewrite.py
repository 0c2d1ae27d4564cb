"""Which heads are found in a traced model, that their meaning stays, and which are left alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from chunkft_fx.graph.layout import wide_dtype
from chunkft_fx.head import operators as head
from chunkft_fx.head.rewrite import chunk_head

CLASSES, FEATURES = 11, 6


class Model(nn.Module):
    """A projection, and a loss of its logits as a test writes it; ``None`` among the results is kept."""

    def __init__(self, loss: Callable[..., Any], dtype: torch.dtype, bias: bool) -> None:
        super().__init__()
        self.norm = nn.Linear(FEATURES, FEATURES, dtype=dtype)
        self.head = nn.Linear(FEATURES, CLASSES, bias=bias, dtype=dtype)
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return self.loss(self.head(self.norm(x).tanh()), labels)


def rewritten(model: nn.Module, *inputs: Tensor) -> tuple[int, fx.GraphModule, Any]:
    """How many heads were rewritten in the traced model, its graph, and what it returns then."""
    seen: list[tuple[int, fx.GraphModule]] = []

    def backend(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        seen.append((chunk_head(gm), gm))
        return gm.forward

    results = torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    ((count, gm),) = seen
    return count, gm, results


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def batch(
    dtype: torch.dtype, rows: tuple[int, ...] = (3, 5), tokens: tuple[int, ...] = (3, 5)
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    labels = torch.randint(0, CLASSES, tokens)
    labels.view(-1)[::4] = -100
    return torch.randn(*rows, FEATURES).to(dtype), labels


def causal(logits: Tensor, labels: Tensor) -> Tensor:
    """The shift of transformers before 4.46, and of much hand-written code."""
    shifted = logits[..., :-1, :].contiguous().float()
    return functional.cross_entropy(shifted.view(-1, CLASSES), labels[..., 1:].contiguous().view(-1))


def padded(logits: Tensor, labels: Tensor) -> Tensor:
    """The shift of today's transformers, with the number of items given."""
    shifted = functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    loss = functional.cross_entropy(
        logits.float().view(-1, CLASSES), shifted.view(-1).to(logits.device), ignore_index=-100, reduction="sum"
    )
    return loss / 7


HEADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda x, y: functional.cross_entropy(x.view(-1, CLASSES), y.view(-1)),
    "causal": causal,
    "padded": padded,
    "flattened": lambda x, y: functional.cross_entropy(torch.flatten(x, 0, 1), y.flatten()),
    "smoothed": lambda x, y: functional.cross_entropy(x.reshape(-1, x.size(-1)), y.view(-1), label_smoothing=0.1),
    "summed": lambda x, y: functional.cross_entropy(x.view(-1, CLASSES), y.view(-1), reduction="sum") * 0.5,
    "other_ignored": lambda x, y: functional.cross_entropy(
        x.view(-1, CLASSES), y.view(-1).clamp(min=2), None, None, 2, None, "mean", 0.2
    ),
    "module": lambda x, y: nn.CrossEntropyLoss(label_smoothing=0.3)(x.view(-1, CLASSES), y.view(-1)),
    "last_token": lambda x, y: functional.cross_entropy(x[:, -1], y[:, 1]),
    "without_first": lambda x, y: functional.cross_entropy(x[:, 1:, :].reshape(-1, CLASSES), y[:, 1:].reshape(-1)),
    "strided": lambda x, y: functional.cross_entropy(x[::2, ...].reshape(-1, CLASSES), y[::2].reshape(-1)),
    "cast_upwards": lambda x, y: functional.cross_entropy(x.to(wide_dtype(x.dtype)).flatten(0, -2), y.flatten()),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_meaning_stays(name: str, dtype: torch.dtype, bias: bool) -> None:
    model = Model(HEADS[name], dtype, bias)
    inputs = batch(dtype)
    count, gm, loss = rewritten(model, *inputs)
    assert count == 1
    assert len(gm.graph.find_nodes(op="call_function", target=head.forward)) == 1
    assert not gm.graph.find_nodes(op="call_function", target=functional.cross_entropy)
    expected = model(*inputs)
    assert loss.dtype == expected.dtype
    # bf16: the plain formula rounds the softmax as well, where it is not cast
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(gradients(model, loss), gradients(model, expected), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_returned_logits_become_none() -> None:
    def loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
        wide = logits.float()
        return HEADS["plain"](wide, labels), logits, {"wide": wide}, labels

    count, _, results = rewritten(Model(loss, torch.bfloat16, False), *batch(torch.bfloat16))
    assert count == 1
    assert results[1] is None and results[2] == {"wide": None}
    assert torch.equal(results[3], batch(torch.float32)[1])


def test_every_head_of_a_model_is_found() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(FEATURES, CLASSES) for _ in range(2))

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            losses = [HEADS["plain"](h(x), labels) for h in self.heads]
            return losses[0] + 2 * losses[1]

    model, inputs = Two(), batch(torch.float32)
    count, _, loss = rewritten(model, *inputs)
    assert count == 2
    torch.testing.assert_close(loss, model(*inputs))


def _masked(x: Tensor, y: Tensor) -> Tensor:
    x[..., 0] = -1e4
    return HEADS["plain"](x, y)


def _written_after(x: Tensor, y: Tensor) -> Tensor:
    y.clamp_(min=0)
    return HEADS["plain"](x, y)


def _read_twice(x: Tensor, y: Tensor) -> Tensor:
    return HEADS["plain"](x, y) + x.logsumexp(-1).square().mean()


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "class_weights": (
        lambda x, y: functional.cross_entropy(x.view(-1, CLASSES), y.view(-1), torch.arange(float(CLASSES))),
        "class weights",
    ),
    "loss_of_each_token": (
        lambda x, y: functional.cross_entropy(x.view(-1, CLASSES), y.view(-1), reduction="none").mean(),
        "keeps a loss for each token",
    ),
    "scaled": (lambda x, y: HEADS["plain"](x * 0.5, y), "changes them"),
    "capped": (lambda x, y: HEADS["plain"](x.tanh(), y), "changes them"),
    "another_reader": (_read_twice, "reads them too"),
    "classes_masked": (_masked, "reads them too"),
    "labels_written": (_written_after, "changed in place"),
    "classes_selected": (lambda x, y: functional.cross_entropy(x[..., 1:].flatten(0, 1), y.flatten() % 3), "changes"),
    "tokens_gathered": (
        lambda x, y: functional.cross_entropy(x[torch.tensor([0, 2])].flatten(0, 1), y[:2].flatten()), "changes them"
    ),
    "selected_after_view": (
        lambda x, y: functional.cross_entropy(x.view(-1, CLASSES)[1:], y.flatten()[1:]), "before tokens are selected"
    ),
    "classes_in_between": (lambda x, y: functional.cross_entropy(x.transpose(1, 2), y), "changes them"),
    "probabilities": (
        lambda x, y: functional.cross_entropy(x.flatten(0, 1), torch.full((15, CLASSES), 1 / CLASSES)), "two dimensions"
    ),
    "classes_split": (
        lambda x, y: functional.cross_entropy(x.reshape(-1, 1), torch.zeros(15 * CLASSES, dtype=torch.int64)), "changes"
    ),
    "halved_precision": (lambda x, y: HEADS["plain"](x.bfloat16(), y), "changes them"),
    "no_projection": (lambda x, y: HEADS["plain"]((x + 1) - 1, y), "changes them"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The graph stays as it is, and the log says why."""
    loss, reason = REFUSED[name]
    model = Model(loss, torch.float32, True)
    with caplog.at_level(logging.DEBUG, logger="chunkft_fx.head.rewrite"):
        count, gm, found = rewritten(model, *batch(torch.float32))
    assert count == 0
    assert not gm.graph.find_nodes(op="call_function", target=head.forward)
    assert reason in caplog.text
    torch.testing.assert_close(found, model(*batch(torch.float32)))


def test_refuses_a_projection_under_autocast() -> None:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return HEADS["plain"](logits, labels)

    model = Model(loss, torch.float32, False)
    with torch.autocast("cpu", torch.bfloat16):
        count, _, _ = rewritten(model, *batch(torch.float32))
    assert count == 0

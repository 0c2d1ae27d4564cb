"""Families of transformers whose batch is split into micro-batches: they give what the whole does, or are refused."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.errors import BudgetInfeasible
from chunkft_fx.tools.zoo import FAMILIES, tiny
from tests.coverage.family_batches import batch_for, loss_of
from tests.coverage.family_check import Result, built, copied
from tests.coverage.sweep_families import registry
from tests.support.forced_splits import split_into

SIZE = 4
# Families that compute in the dtype of their weights but for the loss, which some compute in float32.
SPLIT = (
    ("causal_lm", "phi"), ("causal_lm", "falcon"), ("causal_lm", "gpt_neox"), ("causal_lm", "codegen"),
    ("masked_lm", "distilbert"), ("masked_lm", "deberta-v2"), ("masked_lm", "albert"), ("seq2seq_lm", "bart"),
    ("sequence_classification", "llama"), ("sequence_classification", "bert"), ("image_classification", "convnext"),
    ("speech_seq2seq", "whisper"),
)  # fmt: skip
# Experts take tokens of all samples together; a function of the user's own has a gradient of its own.
REFUSED = {
    "mixtral": r"aten.sort.default \(.*moe.py, line \d+: .*looks at all samples",
    "qwen2_moe": r"aten.sort.default \(.*moe.py, line \d+: .*looks at all samples",
    "bloom": r"autograd_function_apply \(.*modeling_bloom.py",
}


def _family(task: str, family: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model and a batch of it; of tokens' labels all of one sample are ignored, and most of another."""
    name = registry(task)[family]
    model, _ = built(Result(task, family, name, ""), getattr(importlib.import_module("transformers"), name), False)
    batch = batch_for(model, task, size=SIZE)
    if batch["labels"].ndim == 2:
        batch["labels"][2] = batch["labels"][3, 3:] = -100
    return model.to(dtype), {n: v.to(dtype) if v.is_floating_point() else v for n, v in batch.items()}


def _compare(model: nn.Module, batch: dict[str, Any], parts: int) -> None:
    plain = copy.deepcopy(model)
    compiled = chunkft_fx.compile(model, "8GB", coverage="all", backend="eager", return_logits=True)
    outputs = []
    for m in (compiled, plain):
        with split_into(parts):
            outputs.append(m(**copied(batch)))
            loss_of(outputs[-1]).backward()
    assert compiled.plan.policy.micro_batches == parts
    for a, b in zip(*(_tensors(o) for o in outputs), strict=True):
        tolerance = 1e-9 if b.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    # below the largest, a gradient is the rounding of sums that cancel, such as that of a bias before a softmax
    scale = max(float(p.grad.abs().max()) for p in plain.parameters() if p.grad is not None)
    for s in compiled.active_slices():
        expected = plain.get_parameter(s.name).grad
        if expected is not None and s.grad is not None:
            torch.testing.assert_close(s.grad / scale, expected / scale, rtol=1e-9, atol=1e-9, msg=s.name)
        else:
            assert all(g is None or not g.any() for g in (expected, s.grad)), s.name


def _tensors(output: Any) -> list[Tensor]:
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [v for v in values if isinstance(v, Tensor)]


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, SIZE])
@pytest.mark.parametrize(("task", "family"), SPLIT)
def test_a_family_is_split_and_equal(task: str, family: str, parts: int) -> None:
    _compare(*_family(task, family, torch.float64), parts)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, SIZE])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "cnn"])
def test_a_family_of_the_zoo_is_split_and_equal(family: str, parts: int) -> None:
    model, batch = tiny(family, torch.float64)
    _compare(model, batch(SIZE, 12, 0), parts)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_is_refused(family: str) -> None:
    model, batch = _family("causal_lm", family, torch.float32)
    compiled = chunkft_fx.compile(model, "8GB", coverage="all", backend="eager")
    with (
        split_into(2),
        pytest.raises(BudgetInfeasible, match=f"not split into micro-batches, because.*{REFUSED[family]}"),
    ):
        compiled(**batch)

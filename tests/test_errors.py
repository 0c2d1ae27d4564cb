"""Bad input gives one clear error: what is wrong, where, and what to change."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx import errors
from chunkft_fx.tools.zoo import tiny
from tests.support.equivalence import smallest_budget


@pytest.mark.parametrize("budget", ["", "lots", "24", "-3GB", "0GB", 0, -5, "nanGB", 1.5, None, True])
def test_a_budget_that_is_not_bytes_is_refused(budget: Any) -> None:
    model, _ = tiny("mlp")
    with pytest.raises(errors.BudgetParseError, match="GB"):
        chunkft_fx.compile(model, budget)


@pytest.mark.parametrize("chunks", ["auto", 4])
def test_an_infeasible_budget_names_what_would_be_enough_and_the_largest_terms(chunks: Any) -> None:
    model, batch = tiny("llama")
    compiled = chunkft_fx.compile(model, "100kB", chunks=chunks, interval=1, backend="eager")
    with pytest.raises(errors.BudgetInfeasible) as caught:
        compiled(**batch(4, 16, 0))
    # weights can wait in host memory, so what is needed is a ring for them, and one chunk's states and gradients
    assert caught.value.smallest_budget_bytes == sum(caught.value.terms.values()) > 100_000
    assert "ring of streamed weights" in list(caught.value.terms)[:3]
    assert str(caught.value.smallest_budget_bytes) in str(caught.value)


@pytest.mark.parametrize(
    ("chunks", "dropout"),
    [("auto", 0.0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((4, 0.0), ("auto", 0.2), (4, 0.2)))],
)
def test_the_smallest_feasible_budget_named_by_the_error_is_feasible(chunks: Any, dropout: float) -> None:
    model, batch = tiny("llama", dropout=dropout)
    smallest = smallest_budget(model, batch(4, 16, 0), chunks)
    compiled = chunkft_fx.compile(model, smallest, chunks=chunks, interval=1, backend="eager")
    compiled(**batch(4, 16, 0)).loss.backward()
    assert compiled.plan.predicted_peak_bytes is not None
    assert compiled.plan.predicted_peak_bytes <= smallest


@pytest.mark.parametrize("chunks", [0, -1, 10**9, 2.5, "three", True])
def test_an_impossible_number_of_chunks_is_refused(chunks: Any) -> None:
    model, _ = tiny("mlp")
    with pytest.raises((errors.ChunkCountError, errors.OptionError), match="chunks"):
        chunkft_fx.compile(model, "1GB", chunks=chunks, interval=1)


@pytest.mark.parametrize("option", [{"order": "sideways"}, {"interval": 0}, {"backend": "tvm"}])
def test_unknown_options_are_refused_by_name(option: dict[str, Any]) -> None:
    model, _ = tiny("mlp")
    with pytest.raises(errors.OptionError, match=re.escape(f"{next(iter(option))}=")):
        chunkft_fx.compile(model, "1GB", **option)


class GraphBreak(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if y.sum().item() > 0:  # a branch on data: torch cannot trace it
            return y.sum()
        return y.square().sum()


def test_a_model_with_a_graph_break_is_refused_with_torchs_reason_and_place() -> None:
    compiled = chunkft_fx.compile(GraphBreak(), "1GB", chunks=1)
    with pytest.raises(errors.UnsupportedGraph) as caught:
        compiled(torch.randn(2, 4))
    assert "test_errors.py" in str(caught.value)
    assert "fullgraph=True" in str(caught.value)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    model, _ = tiny("mlp")
    with pytest.raises(errors.NoTrainableParameters, match="requires_grad_"):
        chunkft_fx.compile(model.requires_grad_(False), "1GB")


def test_an_already_compiled_model_is_refused() -> None:
    model, _ = tiny("mlp")
    with pytest.raises(errors.AlreadyCompiled, match="chunkft_fx"):
        chunkft_fx.compile(chunkft_fx.compile(model, "1GB", chunks=2, interval=1), "1GB", chunks=2, interval=1)
    with pytest.raises(errors.AlreadyCompiled, match=r"torch\.compile"):
        chunkft_fx.compile(torch.compile(model), "1GB")  # type: ignore[arg-type]
    other, _ = tiny("mlp")
    other.compile()
    with pytest.raises(errors.AlreadyCompiled, match=r"torch\.compile"):
        chunkft_fx.compile(other, "1GB")


def test_something_that_is_no_model_is_refused() -> None:
    with pytest.raises(errors.OptionError, match="Module"):
        chunkft_fx.compile(lambda x: x, "1GB")  # type: ignore[arg-type]


def test_an_optimizer_over_another_model_is_refused() -> None:
    model, _ = tiny("mlp")
    for other in (model, model.parameters(), torch.compile(model)):
        with pytest.raises(errors.OptimizerMismatch, match=r"chunkft_fx\.compile"):
            chunkft_fx.AdamW(other)  # type: ignore[arg-type]


def test_the_plan_is_asked_for_too_early() -> None:
    model, _ = tiny("mlp")
    compiled = chunkft_fx.compile(model, "1GB")
    for ask in (lambda: compiled.plan, lambda: compiled.program, lambda: compiled.templates):
        with pytest.raises(errors.NotPlanned, match="call"):
            ask()


def test_a_chunk_that_does_not_exist_is_refused() -> None:
    model, _ = tiny("mlp")
    compiled = chunkft_fx.compile(model, "1GB", chunks=2, interval=1)
    with pytest.raises(errors.OptionError, match="0 to 1"):
        compiled.activate(2)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    model, batch = tiny("mlp")
    compiled = chunkft_fx.compile(model, "1GB", chunks=2, interval=1, backend="eager")
    optimizer = chunkft_fx.AdamW(compiled)
    compiled(**batch(2, 4, 0))[0].backward()
    optimizer.step()
    other, _ = tiny("cnn")
    with pytest.raises(errors.CheckpointMismatch):
        chunkft_fx.AdamW(chunkft_fx.compile(other, "1GB", chunks=2, interval=1)).load_state_dict(optimizer.state_dict())

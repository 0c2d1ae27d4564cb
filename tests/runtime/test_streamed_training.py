"""With weights in host memory a run is still torch's AdamW or the reference loop, and any kind of step is right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import chunkft_fx
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.tools.zoo import tiny
from tests import test_errors
from tests.program import test_structure
from tests.runtime import test_step, test_training
from tests.support.equivalence import loss_of
from tests.support.forced_streaming import SHARES, streaming

# Runs, each with every share of streamed weights; what is not listed as quick is slow.
ADAMW = [(family, "eager", torch.float32) for family in ("llama", "gpt2", "bert", "t5", "cnn")]
ADAMW += [(family, "inductor", torch.float64) for family in ("bert", "mlp")]
QUICK_ADAMW = {("cnn", "eager", torch.float32, "mixed"), ("mlp", "inductor", torch.float64, "all")}
LOOP = [(family, interval) for family in ("llama", "t5", "mlp") for interval in (1, 2)]
QUICK_LOOP = {("mlp", 2, "mixed")}

# Steps that are not the plain pair of forward and backward, and what stands in for the model.
STEPS: tuple[Callable[[], None], ...] = (
    test_step.test_gradients_accumulate_over_backward_calls,
    test_step.test_two_forwards_before_their_backwards,
    test_step.test_one_loss_made_of_two_forwards,
    test_step.test_evaluation_between_forward_and_backward,
    test_step.test_backward_twice_is_refused,
    test_step.test_retain_graph_allows_a_second_backward,
    test_step.test_backward_after_a_chunk_switch_is_refused,
    test_step.test_backward_after_a_weight_change_is_refused,
    test_step.test_gradients_of_outputs_beside_the_loss,
    test_step.test_an_expected_gradient_that_does_not_come_counts_as_zero,
    test_step.test_inputs_that_need_a_gradient_get_it,
    test_step.test_running_statistics_are_updated_as_in_the_plain_model,
    test_step.test_varying_lengths_are_captured_at_most_twice,
    test_step.test_autocast_matches_the_plain_model,
    test_errors.test_a_checkpoint_of_another_model_is_refused,
)
QUICK_STEPS = {
    (test_step.test_evaluation_between_forward_and_backward, "all"),
    (test_step.test_running_statistics_are_updated_as_in_the_plain_model, "mixed"),
    (test_errors.test_a_checkpoint_of_another_model_is_refused, "all"),
}


def cases(choices: Sequence[tuple[Any, ...]], quick: set[Any]) -> list[Any]:
    """Each choice with every share of streamed weights; those not in ``quick`` are slow."""
    found = [(*choice, share) for choice in choices for share in SHARES]
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in found]


@pytest.mark.parametrize(("family", "backend", "dtype", "share"), cases(ADAMW, QUICK_ADAMW))
def test_one_chunk_equals_torch_adamw(family: str, backend: str, dtype: torch.dtype, share: str) -> None:
    with streaming(share):
        test_training.test_one_chunk_equals_torch_adamw(family, backend, dtype)


@pytest.mark.parametrize(("family", "interval", "share"), cases(LOOP, QUICK_LOOP))
def test_chunks_equal_a_loop_that_updates_only_the_active_slices(family: str, interval: int, share: str) -> None:
    with streaming(share):
        test_training.test_chunks_equal_a_loop_that_updates_only_the_active_slices(family, interval)


@pytest.mark.parametrize(("step", "share"), cases([(step,) for step in STEPS], QUICK_STEPS))
def test_steps_of_any_kind_are_those_of_resident_weights(step: Callable[[], None], share: str) -> None:
    with streaming(share):
        step()


@pytest.mark.parametrize("share", [pytest.param(share, marks=pytest.mark.slow) for share in SHARES])
def test_a_failure_inside_backward_leaves_gradients_as_they_were(share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with streaming(share):
        test_step.test_a_failure_inside_backward_leaves_gradients_as_they_were(monkeypatch)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_independent_and_compiled(how: str) -> None:
    with streaming("all"):
        test_step.test_copies_are_independent_and_compiled(how)


def train(compiled: CompiledModule, optimizer: chunkft_fx.AdamW, batch: Any, steps: range) -> None:
    for step in steps:
        loss_of(compiled(**batch(2, 12, step))).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_run_saved_with_resident_weights_continues_with_streamed_ones(tmp_path: Path) -> None:
    """To the bit, also across a file: a checkpoint does not depend on where the weights lay."""
    model, batch = tiny("mlp")
    options: dict[str, Any] = {"chunks": 4, "interval": 1, "order": "random", "seed": 3, "backend": "eager"}
    whole = chunkft_fx.compile(copy.deepcopy(model), "64GB", **options)
    optimizer = chunkft_fx.AdamW(whole, **test_training.SETTINGS)
    train(whole, optimizer, batch, range(6))
    torch.save((whole.state_dict(), optimizer.state_dict()), tmp_path / "resident.pt")
    train(whole, optimizer, batch, range(6, 14))
    with streaming("all"):
        resumed = chunkft_fx.compile(copy.deepcopy(model), "64GB", **options)
        again = chunkft_fx.AdamW(resumed, **test_training.SETTINGS)
        train(resumed, again, batch, range(1))  # its weights are in host memory when the checkpoint comes
        weights, state = torch.load(tmp_path / "resident.pt")
        resumed.load_state_dict(weights)
        again.load_state_dict(state)
        train(resumed, again, batch, range(6, 10))
        torch.save((resumed.state_dict(), again.state_dict()), tmp_path / "streamed.pt")
    weights, state = torch.load(tmp_path / "streamed.pt")
    model.load_state_dict(weights)
    last = chunkft_fx.compile(model, "64GB", **options)
    end = chunkft_fx.AdamW(last, **test_training.SETTINGS)
    end.load_state_dict(state)
    train(last, end, batch, range(10, 14))
    for (name, a), b in zip(last.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "structure",
    [
        test_structure.test_a_deep_llama_has_few_templates_few_variants_and_in_the_second_sweep_no_new_ones,
        test_structure.test_with_the_top_block_active_no_region_below_runs_backward_or_saves,
        test_structure.test_regions_above_the_active_chunk_compute_no_weight_gradient,
    ],
)
@pytest.mark.parametrize("share", SHARES)
def test_streams_change_no_structure(structure: Callable[[], None], share: str) -> None:
    with streaming(share):
        structure()

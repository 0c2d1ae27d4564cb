"""Checkpoints read into a real compiled model: options of its own, names compared, what it does not do refused."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import nn

import chunkft_fx
from chunkft_fx.errors import CheckpointMismatch
from chunkft_fx.tools.zoo import tiny
from tests.support.waiting import waiting_in_host


class Twins(nn.Module):
    """Two parameters that differ in nothing but their names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.ones(64, 2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x
        for p in self.parameters():
            total = total @ p @ p.t()
        return total.sum()


def optimizer_of(model: nn.Module, **options: Any) -> chunkft_fx.AdamW:
    return chunkft_fx.AdamW(chunkft_fx.compile(model, "1GB", chunks=1, backend="eager"), **options)


def torch_state(model: nn.Module, **options: Any) -> dict[str, Any]:
    """A checkpoint of torch's optimizer after one step."""
    optimizer = torch.optim.AdamW(model.named_parameters(), **options)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("switch", ["maximize", "amsgrad"])
def test_what_this_optimizer_does_not_do_is_refused(switch: str) -> None:
    optimizer = optimizer_of(Twins("a", "b"))
    saved = torch_state(Twins("a", "b"), **{switch: True})
    for state in saved["state"].values():
        state.pop("max_exp_avg_sq", None)  # so that nothing but the switch tells
    with pytest.raises(CheckpointMismatch, match=f"{switch}=True"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state


def test_names_are_compared_in_a_checkpoint_of_torch() -> None:
    optimizer = optimizer_of(Twins("a", "b"))
    with pytest.raises(CheckpointMismatch, match="parameter 'b' where this model has 'a'"):
        optimizer.load_state_dict(torch_state(Twins("b", "a")))
    optimizer.load_state_dict(torch_state(Twins("a", "b")))


def test_names_are_compared_in_a_checkpoint_of_this_library() -> None:
    saved = optimizer_of(Twins("b", "a")).state_dict()
    del saved["param_groups"][0]["param_names"]  # so that the library's own entry must tell
    with pytest.raises(CheckpointMismatch, match=r"parameter 'b' of shape \(64, 2\) where this model has 'a'"):
        optimizer_of(Twins("a", "b")).load_state_dict(saved)


def test_loaded_options_are_copies() -> None:
    """A scheduler may change a group's options in place, and one checkpoint may be loaded twice."""
    saved = torch_state(Twins("a", "b"), lr=torch.tensor(0.5))
    saved["param_groups"][0]["betas"] = [0.8, 0.9]
    kept = copy.deepcopy(saved["param_groups"])
    optimizer = optimizer_of(Twins("a", "b"))
    optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.5
    group["lr"].fill_(0.1)
    group["betas"][0] = 0.1
    assert saved["param_groups"] == kept


def test_a_float32_run_is_not_continued_in_bfloat16() -> None:
    """The masters would silently be the rounded weights."""
    model, batch = tiny("mlp")
    module = chunkft_fx.compile(model, "1GB", chunks=1, backend="eager")
    wide = chunkft_fx.AdamW(module)
    module(**batch(2, 4, 0))[0].backward()
    wide.step()
    narrow = optimizer_of(tiny("mlp", torch.bfloat16)[0])
    with pytest.raises(CheckpointMismatch, match="has no master weight"):
        narrow.load_state_dict(wide.state_dict())
    assert not narrow.state


@pytest.mark.parametrize("version", [None, 0, 3])
def test_an_entry_of_another_version_is_refused_before_anything_changes(version: int | None) -> None:
    optimizer = optimizer_of(Twins("a", "b"))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["chunkft"]["version"] = version
    before = optimizer.param_groups[0]["lr"]
    saved["param_groups"][0]["lr"] = before * 2
    with pytest.raises(CheckpointMismatch, match=f"version {version!r}.*reads versions up to 2"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == before


@pytest.mark.parametrize("options", [{"coverage": "all"}, {"chunks": 1}, {"chunks": 3, "interval": 1}])
@pytest.mark.parametrize("in_host", [False, True])
def test_gradients_stay_when_the_optimizer_is_loaded(options: dict[str, Any], in_host: bool) -> None:
    """As with torch's: a second backward adds to them, and the step uses the sum."""
    model, batch = tiny("llama", dtype=torch.float64)
    with waiting_in_host() if in_host else contextlib.nullcontext():
        ours, reference = (
            chunkft_fx.compile(copy.deepcopy(model), "1GB", backend="eager", **options) for _ in range(2)
        )
        optimizers = [chunkft_fx.AdamW(m, lr=1e-2) for m in (ours, reference)]
        for step in range(2):
            for m, optimizer in zip((ours, reference), optimizers, strict=True):
                m(**batch(2, 8, 2 * step)).loss.backward()
                if m is ours:
                    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                m(**batch(2, 8, 2 * step + 1)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b)


def test_gradients_of_a_chunk_that_is_left_by_loading_are_dropped() -> None:
    model, batch = tiny("llama")
    ours = chunkft_fx.compile(model, "1GB", chunks=3, interval=1, order="ascending", backend="eager")
    optimizer = chunkft_fx.AdamW(ours, lr=1e-2)
    ours(**batch(2, 8, 0)).loss.backward()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    ours(**batch(2, 8, 1)).loss.backward()
    optimizer.load_state_dict(saved)
    assert ours.chunk == 0
    assert all(p.grad is None for p in ours.parameters())

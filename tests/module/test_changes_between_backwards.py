"""A model that changes while gradients wait for their step: they stay, and the step is the plain model's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import chunkft_fx
from chunkft_fx import errors
from tests.support.tiny_lm import lm_batch, lm_compiled, tiny_lm

Change = Callable[[Any], None]


def _freeze_head_to_evaluate(m: Any) -> None:
    m.head.requires_grad_(False)
    _evaluate(m)
    m.head.requires_grad_(True)


def _freeze_all_to_evaluate(m: Any) -> None:
    m.requires_grad_(False)
    _evaluate(m)
    m.requires_grad_(True)


def _replace_a_bias(m: Any) -> None:
    m.layers[1][1].bias = nn.Parameter(m.layers[1][1].bias.detach() * 0.5)
    _evaluate(m)


def _evaluate(m: Any) -> None:
    with torch.no_grad():
        m.eval()(**lm_batch(7))
    m.train()


def _gradients(m: nn.Module, change: Change) -> list[torch.Tensor | None]:
    m(**lm_batch(1)).backward()
    change(m)
    m(**lm_batch(2)).backward()
    return [p.grad for p in m.parameters()]


@pytest.mark.parametrize("change", [_freeze_head_to_evaluate, _freeze_all_to_evaluate, _replace_a_bias])
@pytest.mark.parametrize("has_begun", [False, True])
def test_gradients_wait_for_their_step_while_the_model_changes(change: Change, has_begun: bool) -> None:
    compiled, plain = lm_compiled(tiny_lm().double(), chunks=1), tiny_lm().double()
    mine, theirs = chunkft_fx.AdamW(compiled, lr=1e-2), torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for step in range(3):
        for p, q in zip(_gradients(compiled, _gradient_free), _gradients(plain, _gradient_free), strict=True):
            torch.testing.assert_close(p, q)
        if step == (1 if has_begun else 0):
            _gradients(compiled, change)
            _gradients(plain, change)
            theirs.param_groups[0]["params"] = list(plain.parameters())
            for p, q in zip(compiled.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)
            if change is _replace_a_bias:
                break  # torch's own optimizer knows nothing of the new one
        for optimizer in (mine, theirs):
            optimizer.step()
            optimizer.zero_grad()
        for p, q in zip(compiled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def _gradient_free(m: Any) -> None:
    """No change between the two backward passes."""


def test_what_was_frozen_for_a_while_keeps_a_wide_gradient() -> None:
    compiled = lm_compiled(tiny_lm().to(torch.bfloat16), chunks=3)
    optimizer = chunkft_fx.AdamW(compiled)
    compiled(**lm_batch()).backward()
    optimizer.step()
    optimizer.zero_grad()
    compiled(**lm_batch(1)).backward()
    before = [s.grad.clone() for s in compiled.active_slices()]
    for is_trained in (False, True):
        compiled.requires_grad_(is_trained)
        with pytest.warns(errors.ChunkFTWarning, match="frozen"):
            _evaluate(compiled)
    assert all(map(torch.equal, before, [s.grad for s in compiled.active_slices()]))
    assert all(g.dtype == torch.float32 for g in before)


@pytest.mark.parametrize("has_begun", [False, True])
def test_plain_tensors_in_the_place_of_parameters_are_refused_by_name(has_begun: bool) -> None:
    model = tiny_lm()
    compiled = lm_compiled(model, chunks=3)
    optimizer = chunkft_fx.AdamW(compiled)
    if has_begun:
        compiled(**lm_batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
    compiled(**lm_batch(1)).backward()
    before = [s.grad.clone() for s in compiled.active_slices()]
    position, slices = compiled.schedule.state_dict(), compiled.active_slices()
    weights = {n: (p.detach() * 0.5).requires_grad_() * 1 for n, p in compiled.named_parameters()}
    with pytest.raises(errors.ModelChanged, match="functional_call"):
        functional_call(compiled, weights, (), lm_batch())
    assert compiled.schedule.state_dict() == position
    assert all(map(torch.equal, before, [s.grad for s in compiled.active_slices()]))
    with torch.no_grad():  # on the plain model it does what it says
        mine = functional_call(model, weights, (), lm_batch())
    halved = copy.deepcopy(model)
    with torch.no_grad():
        for p in halved.parameters():
            p.mul_(0.5)
        assert torch.equal(mine, halved(**lm_batch()))
    assert compiled.active_slices() == slices
    optimizer.step()


@pytest.mark.parametrize("has_begun", [False, True])
def test_what_left_the_model_is_its_users_own_again(has_begun: bool) -> None:
    compiled = lm_compiled(tiny_lm(), chunks=2)
    optimizer = chunkft_fx.AdamW(compiled)
    compiled(**lm_batch()).backward()
    if has_begun:
        optimizer.step()
    optimizer.zero_grad()
    old = compiled.head
    compiled.head = copy.deepcopy(old)
    compiled(**lm_batch())
    before, own = old.weight.detach().clone(), torch.optim.SGD(old.parameters(), lr=1.0)
    old(torch.ones(8)).sum().backward()
    own.step()
    assert not torch.equal(before, old.weight)
    again = lm_compiled(nn.Sequential(old), chunks=1)
    again(torch.ones(2, 8)).sum().backward()
    with pytest.raises(errors.OptimizerConflict):
        torch.optim.SGD(compiled.head.parameters(), lr=1.0).step()


def test_a_move_to_where_no_model_can_run_is_refused_before_a_tensor_moves() -> None:
    compiled = lm_compiled(tiny_lm())
    with pytest.raises(errors.OptionError, match="meta"):
        compiled.to("meta")
    assert all(p.device.type == "cpu" for p in compiled.parameters())
    compiled(**lm_batch()).backward()


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_new_kind_of_call_is_traced_while_a_wide_gradient_waits(chunks: int) -> None:
    compiled, alone = (lm_compiled(tiny_lm().to(torch.bfloat16), chunks) for _ in range(2))
    lengths = (5, 7, 9)
    for length in lengths:
        compiled(**lm_batch(length=length)).backward()
        _evaluate(compiled)
    sums: dict[str, torch.Tensor] = {}
    for length in lengths:
        alone(**lm_batch(length=length)).backward()
        sums = {s.name: sums.get(s.name, 0) + s.grad for s in alone.active_slices()}
        alone.zero_grad()
    for s in compiled.active_slices():
        torch.testing.assert_close(s.grad, sums[s.name], rtol=1e-6, atol=1e-6)


def _rename_head(m: Any) -> None:
    m.renamed = m.head
    m.head = nn.Identity()
    m.layers.append(m.renamed)
    del m.renamed
    m.layers[2] = nn.Sequential(m.layers[2], nn.Linear(13, 8, bias=False, dtype=torch.float64))
    nn.init.constant_(m.layers[2][1].weight, 0.1)


def _parametrize_head(m: Any) -> None:
    parametrize.register_parametrization(m.head, "weight", nn.Softmax(-1))


@pytest.mark.parametrize("move", [_parametrize_head, _rename_head])
@pytest.mark.parametrize("chunks", [1, 4])
def test_a_parameter_that_moved_to_another_module_is_trained_under_its_new_name(move: Change, chunks: int) -> None:
    compiled, plain = lm_compiled(tiny_lm().double(), chunks), tiny_lm().double()
    seen: set[str] = set()
    for m in (compiled, plain):
        m(**lm_batch()).backward()
        m.zero_grad()
        move(m)
    plain(ids=lm_batch()["ids"]).square().sum().backward()
    compiled(ids=lm_batch()["ids"])
    for chunk in range(chunks):
        compiled.activate(chunk)
        compiled(ids=lm_batch()["ids"]).square().sum().backward()
        for s in compiled.active_slices():
            dense = plain.get_parameter(s.name).grad
            assert (dense is None) == (s.grad is None)
            if dense is not None:
                torch.testing.assert_close(s.grad, dense.narrow(s.dim, s.start, s.length))
                seen.add(s.name)
        compiled.zero_grad()
    assert seen == {n for n, p in plain.named_parameters() if p.grad is not None}

"""What torch would quietly do otherwise around a compiled module, refused by name before anything changes, or right."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import chunkft_fx
from chunkft_fx import errors
from tests.support.tiny_lm import lm_batch, lm_compiled, tiny_lm

Around = Callable[[], contextlib.AbstractContextManager[Any]]

AROUND: list[Around] = [
    lambda: FlopCounterMode(display=False),
    lambda: torch.compiler.set_stance("force_eager"),
    lambda: torch.compiler.set_stance("eager_on_recompile"),
    lambda: torch.compiler.set_stance("default", force_backend="eager"),
    lambda: torch._dynamo.config.patch(disable=True),
]


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("was_called", [False, True])
def test_where_torch_would_run_the_plain_model_the_call_is_refused(around: Around, was_called: bool) -> None:
    compiled = lm_compiled(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), chunks=1)
    x = torch.linspace(-1, 1, 6).view(2, 3)
    if was_called:
        compiled(x)
    before = copy.deepcopy(compiled.state_dict())
    with around(), pytest.raises(errors.UnsupportedGraph, match="plain model"):
        compiled(x)
    assert all(map(torch.equal, before.values(), compiled.state_dict().values()))
    compiled(x).square().sum().backward()
    assert compiled._training.arrivals.through


# torch's own use of it; the warning's class differs between versions
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_tangents_of_forward_mode_are_refused_or_right() -> None:
    compiled, plain = lm_compiled(tiny_lm(), chunks=1), tiny_lm()
    x = torch.linspace(-1, 1, 80).view(2, 5, 8)

    def tangent(m: Callable[..., Any]) -> torch.Tensor | None:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            return forward_ad.unpack_dual(m(embeds=dual)).tangent

    with pytest.raises(errors.UnsupportedGraph, match="forward-mode"):
        tangent(compiled)
    with torch.no_grad():
        try:
            expected = tangent(torch.compile(plain, backend="eager", fullgraph=True))
        except torch._dynamo.exc.Unsupported:  # since torch 2.14
            with pytest.raises(errors.UnsupportedGraph, match="forward-mode"):
                tangent(compiled)
        else:
            torch.testing.assert_close(tangent(compiled), expected)


def test_anomaly_detection_looks_into_slices() -> None:
    compiled = lm_compiled(tiny_lm(), chunks=5)
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        for chunk in range(5):
            compiled.activate(chunk)
            (compiled(**lm_batch()) + sum(p.square().sum() for p in compiled.parameters())).backward()
    assert all(bool(s.grad.isfinite().all()) for s in compiled.active_slices())


@pytest.mark.parametrize("named", [False, True])
def test_a_group_of_other_parameters_is_refused(named: bool) -> None:
    optimizer = chunkft_fx.AdamW(lm_compiled(tiny_lm()))
    other = nn.Parameter(torch.ones(3))
    with pytest.raises(errors.OptionError, match="optimizer of their own"):
        optimizer.add_param_group({"params": [("other", other)] if named else [other]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("how", ["a group", "into a group"])
def test_other_parameters_put_into_the_groups_by_hand_are_refused(how: str) -> None:
    compiled = lm_compiled(tiny_lm())
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2)
    compiled(**lm_batch()).backward()
    before = {n: p.detach().clone() for n, p in compiled.named_parameters()}
    group, other = optimizer.param_groups[0], nn.Parameter(torch.ones(3))
    if how == "a group":
        optimizer.param_groups.append(group | {"params": [other], "param_names": ["other"]})
    else:
        group["params"].append(other)
    with pytest.raises(errors.OptionError, match="optimizer of its own"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in compiled.named_parameters())


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_of_the_optimizer_is_refused(how: Callable[[Any], Any]) -> None:
    compiled = lm_compiled(tiny_lm())
    optimizer = chunkft_fx.AdamW(compiled)
    with pytest.raises(errors.OptimizerMismatch, match="state_dict"):
        how(optimizer)
    compiled(**lm_batch()).backward()
    optimizer.step()


@pytest.mark.parametrize("option", ["maximize", "amsgrad"])
def test_an_option_that_only_torchs_optimizer_has_is_refused_before_a_weight_changes(option: str) -> None:
    compiled = lm_compiled(tiny_lm())
    optimizer = chunkft_fx.AdamW(compiled)
    compiled(**lm_batch()).backward()
    before = copy.deepcopy(compiled.state_dict())
    optimizer.param_groups[0][option] = True
    with pytest.raises(errors.OptionError, match=option):
        optimizer.step()
    assert all(map(torch.equal, before.values(), compiled.state_dict().values()))
    optimizer.param_groups[0][option] = False
    optimizer.step()
    assert not all(map(torch.equal, before.values(), compiled.state_dict().values()))

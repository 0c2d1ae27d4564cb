"""Checkpoints with moments in 8 bits: the same to the bit again, in any other format, or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from chunkft_fx.errors import CheckpointMismatch
from chunkft_fx.graph.layout import front
from chunkft_fx.kernels.blocks import dequantised, quantised
from chunkft_fx.plan.cuts import cut_dim
from tests.support.block_net import BLOCKS, block_net, feed_sweep
from tests.support.eight_bits import (
    BF16,
    MOMENTS,
    OPTIONS,
    assert_same_states,
    assert_same_weights,
    floats,
    made,
    sweeps,
    through_a_file,
    trained,
)


@pytest.mark.parametrize("moment", [1, 4, 5])
def test_resume_equals_an_uninterrupted_run(moment: int) -> None:
    """Also in the midst of a sweep, where some slices were never updated."""
    straight, optimizer = made(chunks=3, master="remainder")
    saved: dict[str, Any] = {}
    for step in range(8):
        if step == moment:
            saved = through_a_file({"model": straight.state_dict(), "optimizer": optimizer.state_dict()})
        feed_sweep(straight, step)
        optimizer.step()
    module, resumed = made(chunks=3, seed=9, master="remainder")
    resumed.load_state_dict(saved["optimizer"])
    module.load_state_dict(saved["model"])
    assert_same_states(resumed.state_dict(), saved["optimizer"])
    for step in range(moment, 8):
        feed_sweep(module, step)
        resumed.step()
    assert_same_states(optimizer.state_dict(), resumed.state_dict())
    assert_same_weights(straight, module)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_8_bits_become_float32_and_the_same_8_bits_again(dtype: torch.dtype) -> None:
    module, optimizer = made(dtype)
    sweeps(module, optimizer, range(2))
    begin = through_a_file(optimizer.state_dict())
    wide = made(dtype, state_dtype="float32")[1]
    wide.load_state_dict(begin)
    between = through_a_file(wide.state_dict())
    again = made(dtype)[1]
    again.load_state_dict(between)
    end = again.state_dict()
    for i, (_, p) in enumerate(module.named_parameters()):
        dim = cut_dim(p.shape)
        for name, signed in MOMENTS:
            values = floats(begin["state"][i], name, signed, dim)
            assert between["state"][i][name].dtype == torch.float32
            assert torch.equal(between["state"][i][name], values)
            assert torch.equal(floats(end["state"][i], name, signed, dim), values)
            if f"{name}_codes" in begin["state"][i]:
                assert torch.equal(end["state"][i][f"{name}_codes"], begin["state"][i][f"{name}_codes"])


@pytest.mark.parametrize("start", ["float32", "bfloat16"])
def test_floats_become_8_bits_as_an_update_rounds_them(start: str) -> None:
    module, optimizer = made(state_dtype=start)
    sweeps(module, optimizer, range(3))
    begin = through_a_file(optimizer.state_dict())
    narrow = made()[1]
    narrow.load_state_dict(begin)
    for i, (name, p) in enumerate(module.named_parameters()):
        found, dim = narrow.state_dict()["state"][i], cut_dim(p.shape)
        for moment, signed in MOMENTS:
            values = begin["state"][i][moment].float()
            if name not in BLOCKS:
                assert torch.equal(found[moment], values)
                continue
            codes, scales = quantised(front(values, dim), signed)
            assert torch.equal(front(found[f"{moment}_codes"], dim), codes)
            assert torch.equal(found[f"{moment}_scales"], scales)


def test_8_bits_become_the_nearest_bfloat16() -> None:
    module, optimizer = made()
    sweeps(module, optimizer, range(2))
    begin = through_a_file(optimizer.state_dict())
    other = made(state_dtype="bfloat16")[1]
    other.load_state_dict(begin)
    for i, (_, p) in enumerate(module.named_parameters()):
        for moment, signed in MOMENTS:
            values = floats(begin["state"][i], moment, signed, cut_dim(p.shape))
            assert torch.equal(other.state_dict()["state"][i][moment], values.bfloat16())


def test_training_goes_on_from_torchs_checkpoint_and_torch_names_what_it_misses() -> None:
    plain = block_net()
    theirs = torch.optim.AdamW(plain.parameters(), **OPTIONS)
    trained(plain, theirs, range(3), torch.float32)  # type: ignore[arg-type]  # the plain model
    module, ours = made(torch.float32, chunks=1)
    module._model.load_state_dict(plain.state_dict())
    ours.load_state_dict(theirs.state_dict())
    trained(module, ours, range(3, 5), torch.float32)
    trained(plain, theirs, range(3, 5), torch.float32)  # type: ignore[arg-type]
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        differences = (p - q).detach().abs() / OPTIONS["lr"]  # of two steps
        assert differences.mean() < 0.03 and differences.max() < 1
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    with pytest.raises(KeyError, match="exp_avg"):
        trained(plain, theirs, range(5, 6), torch.float32)  # type: ignore[arg-type]


def test_states_saved_while_another_dimension_was_cut_are_converted() -> None:
    module, optimizer = made(chunks=1)
    sweeps(module, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    at = [name for name, _ in module.named_parameters()].index("across")
    saved["chunkft"]["parameters"][at][2] = 2
    values = {}
    for moment, signed in MOMENTS:
        value = floats(saved["state"][at], moment, signed, 1)
        codes, scales = quantised(value.movedim(2, 0).contiguous(), signed)
        saved["state"][at] |= {f"{moment}_codes": codes.movedim(0, 2).contiguous(), f"{moment}_scales": scales}
        values[moment] = dequantised(codes, scales, signed).movedim(0, 2)
    saved["state"][at]["slice_steps"] = [[0, 60, 2]]
    other = made(chunks=1)[1]
    other.load_state_dict(saved)
    for moment, signed in MOMENTS:
        codes, scales = quantised(front(values[moment], 1), signed)
        found = other.state_dict()["state"][at]
        assert torch.equal(front(found[f"{moment}_codes"], 1), codes)
        assert torch.equal(found[f"{moment}_scales"], scales)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("exp_avg_scales"), r"holds .*'exp_avg_codes'"),
        (lambda s: s.update(exp_avg=s.pop("exp_avg_codes")), "holds"),
        (lambda s: s.update(exp_avg=torch.zeros(300, 256)), "holds"),
        (lambda s: s.update(master_codes=s["exp_avg_codes"], master_scales=s["exp_avg_scales"]), "holds"),
        (lambda s: s.update(exp_avg_scales=s["exp_avg_scales"][:-1]), r"exp_avg_scales .*it must be \(300, 1\)"),
        (lambda s: s.update(exp_avg_codes=s["exp_avg_codes"][:-1]), r"exp_avg_codes .*it must be \(300, 256\)"),
        (lambda s: s.update(exp_avg_codes=s["exp_avg_codes"].float()), "float32, not torch.uint8"),
        (lambda s: s.update(exp_avg_scales=s["exp_avg_scales"].double()), "float64, not torch.float32"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(change: Any, message: str) -> None:
    module, optimizer = made(chunks=1)
    sweeps(module, optimizer, range(1))
    broken = copy.deepcopy(optimizer.state_dict())
    at = [name for name, _ in module.named_parameters()].index("first.weight")
    change(broken["state"][at])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointMismatch, match=message):
        optimizer.load_state_dict(broken)
    assert_same_states(before, optimizer.state_dict())


def test_numbers_of_codes_are_not_taken_for_moments() -> None:
    module, optimizer = made(torch.float32, chunks=1, state_dtype="float32")
    sweeps(module, optimizer, range(1))
    broken = copy.deepcopy(optimizer.state_dict())
    broken["state"][0]["exp_avg"] = broken["state"][0]["exp_avg"].to(torch.uint8)
    with pytest.raises(CheckpointMismatch, match="uint8"):
        optimizer.load_state_dict(broken)

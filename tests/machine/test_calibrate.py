"""Calibration: measured figures make sense, and measuring leaves the random state alone."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch

from chunkft_fx.machine import calibrate as module
from chunkft_fx.machine.calibrate import calibrate


def test_the_cpu_is_measured_with_positive_finite_rates() -> None:
    state = torch.get_rng_state()
    found = calibrate("cpu")
    figures = asdict(found)
    by_dtype = figures.pop("matmul_flops_per_s")
    assert set(by_dtype) == {"bfloat16", "float16", "float32", "float64"}
    assert all(math.isfinite(f) and f > 0 for f in [*by_dtype.values(), *figures.values()])
    assert found.slowed_by_copies == 1  # nothing is copied there
    assert torch.equal(state, torch.get_rng_state())


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="meta"):
        calibrate("meta")


def test_a_link_that_others_used_for_a_while_is_not_taken_for_a_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("host_to_device_nbytes_per_s", "device_to_host_nbytes_per_s", "both_ways_nbytes_per_s")
    seen = [dict(zip(names, rates, strict=True)) for rates in ((1e9, 5e9, 3e9), (4e9, 2e9, 3.5e9))]
    monkeypatch.setattr(module, "_links", lambda _device, _smaller: seen.pop())
    found = calibrate("cpu")
    assert [getattr(found, name) for name in names] == [4e9, 5e9, 3.5e9]

"""Rates on CUDA: in the right order of magnitude to each other, quick to take, and leaving nothing behind."""

from __future__ import annotations

import time

import pytest
import torch

from chunkft_fx.machine.calibrate import calibrate

pytestmark = pytest.mark.gpu


def test_a_gpu_is_measured_within_a_minute_and_gives_its_memory_back() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    allocated = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    found = calibrate("cuda")
    assert time.perf_counter() - start < 60
    assert torch.cuda.max_memory_allocated() - allocated <= 600 * 2**20
    assert torch.cuda.memory_reserved() <= before + 64 * 2**20  # a library's own workspace may stay
    flops = found.matmul_flops_per_s
    assert flops["bfloat16"] > flops["float32"]
    # No direction is faster than device memory, and none gains from the other being busy.
    link = max(found.host_to_device_nbytes_per_s, found.device_to_host_nbytes_per_s)
    assert found.both_ways_nbytes_per_s < 1.05 * link
    assert link < found.memory_nbytes_per_s
    assert 1 <= found.slowed_by_copies < 1.5


def test_two_measurements_agree() -> None:
    first, second = calibrate("cuda"), calibrate("cuda")
    assert second.matmul_flops_per_s["bfloat16"] == pytest.approx(first.matmul_flops_per_s["bfloat16"], rel=0.15)
    assert second.memory_nbytes_per_s == pytest.approx(first.memory_nbytes_per_s, rel=0.1)
    assert second.host_to_device_nbytes_per_s == pytest.approx(first.host_to_device_nbytes_per_s, rel=0.1)

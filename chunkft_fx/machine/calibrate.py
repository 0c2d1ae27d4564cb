"""Measures a device's rates: it multiplies matrices, moves bytes and starts small kernels, and takes the time."""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chunkft_fx.copies.host_memory import pinned_zeros
from chunkft_fx.machine.rates import Rates
from chunkft_fx.torch_internals import release_workspaces

log = logging.getLogger("chunkft_fx.machine.calibrate")

# Elements of a matrix side. 8192 fills a large GPU for low precision; the wide types are slower and larger, so 4096.
_MATRIX_SIDE = {
    "cuda": {torch.bfloat16: 8192, torch.float16: 8192, torch.float32: 4096, torch.float64: 4096},
    "cpu": {torch.bfloat16: 256, torch.float16: 256, torch.float32: 512, torch.float64: 512},
}
# Bytes of a copied buffer: several times the last-level cache (an H200 has 50 MiB of L2).
_BUFFER_NBYTES = {"cuda": 256 * 2**20, "cpu": 64 * 2**20}
# Seconds spent on each measurement: long enough on a GPU for its clocks to settle under load.
_SECONDS = {"cuda": 0.5, "cpu": 0.05}
_LAUNCHES = 200
# On a device that is nearly full, by how much smaller each try is. At a sixteenth a product still fills a large GPU.
_SMALLER = (1, 4, 16)


def calibrate(device: torch.device | str) -> Rates:
    """Measure a device; takes some ten seconds on CUDA, about one on the CPU.

    Needs up to 600 MiB of device memory while it runs (given back to the system at the end) and 512 MiB of pinned
    host memory; on a device that is nearly full it measures with less. Raises `ValueError` for a device that is neither
    CUDA nor the CPU.
    """
    device = torch.device(device)
    if device.type not in _BUFFER_NBYTES:
        raise ValueError(f"no rates can be measured on {device}: only CUDA devices and the CPU are supported")
    for smaller in _SMALLER:
        start = time.perf_counter()
        try:
            with torch.no_grad(), _current(device):
                measured = _measure(device, smaller)
        except torch.OutOfMemoryError as error:
            log.info("%s has no room to be measured at 1/%d of the full size", device, smaller)
            if smaller == _SMALLER[-1]:
                error.add_note(
                    "The first plan on a machine measures how fast its GPU is, which takes up to 600 MiB beside the "
                    "model: free some of the GPU's memory"
                )
                raise
        else:
            log.info("measured %s in %.1f s: %s", device, time.perf_counter() - start, measured)
            return measured
        finally:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                release_workspaces()  # one lies within a segment of this measurement, and would keep all of it
                torch.cuda.empty_cache()
    raise AssertionError("the last size either measures or raises")


def _measure(device: torch.device, smaller: int) -> Rates:
    """The rates by matrices and buffers of 1/``smaller`` of the full bytes."""
    links = _links(device, smaller)
    dtypes = _MATRIX_SIDE[device.type]
    return Rates(
        matmul_flops_per_s={str(d).removeprefix("torch."): _matmul(device, d, smaller) for d in dtypes},
        memory_nbytes_per_s=_memory(device, smaller),
        launch_us=_launch(device),
        # twice, seconds apart, since others may use the link for a while, which only makes it look slower
        **{name: max(rate, links[name]) for name, rate in _links(device, smaller).items()},
    )


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The median time of one call of ``run``, over as many calls as fit the time for a measurement."""
    times: list[float] = []
    for _ in range(2):
        elapsed_seconds(run, device)  # the first calls choose algorithms and fill pools
    end = time.perf_counter() + _SECONDS[device.type]
    while len(times) < 3 or time.perf_counter() < end:
        times.append(elapsed_seconds(run, device))
    return statistics.median(times)


def elapsed_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The time of one call: on CUDA between events on the current stream, else by the clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def _matmul(device: torch.device, dtype: torch.dtype, smaller: int = 1) -> float:
    side = _MATRIX_SIDE[device.type][dtype] // math.isqrt(smaller)
    # Random values, because a GPU clocks higher on constants; from a generator of their own, so that no draw of the
    # program around is taken.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _seconds(lambda: torch.mm(a, b, out=out), device)


def _memory(device: torch.device, smaller: int = 1) -> float:
    source = torch.ones(_BUFFER_NBYTES[device.type] // smaller, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def _links(device: torch.device, smaller: int = 1) -> dict[str, float]:
    """Rates between host and device; on the CPU those of plain copies, which is what streams lower to there."""
    nbytes = _BUFFER_NBYTES[device.type] // smaller
    is_cuda = device.type == "cuda"
    there, back = (pinned_zeros(nbytes, device) if is_cuda else torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    into, out = (torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    sides = [torch.cuda.Stream(), torch.cuda.Stream()] if is_cuda else []

    def copy(target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def both() -> None:
        pairs = ((into, there), (back, out))
        if not sides:
            for target, source in pairs:
                copy(target, source)
            return
        for side, (target, source) in zip(sides, pairs, strict=True):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                copy(target, source)
        for side in sides:
            torch.cuda.current_stream().wait_stream(side)

    return {
        "host_to_device_nbytes_per_s": nbytes / _seconds(lambda: copy(into, there), device),
        "device_to_host_nbytes_per_s": nbytes / _seconds(lambda: copy(back, out), device),
        "both_ways_nbytes_per_s": nbytes / _seconds(both, device),
    }


def _launch(device: torch.device) -> float:
    tiny = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(_LAUNCHES):
            tiny.add_(1)

    return _seconds(many, device) / _LAUNCHES * 1e6

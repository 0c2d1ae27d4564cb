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
# Seconds spent on each measurement.
_SECONDS = {"cuda": 0.15, "cpu": 0.05}
# Seconds of products before those that are measured, and of these. A GPU that begins to work, also behind a short
# pause, is faster than one that has worked for a while: it lowers its clocks to stay within its power, up and down by
# 2% twice a second (one H200: 711 TFLOP/s behind a pause, 650 to 675 under load).
_LOAD_SECONDS = {"cuda": 1.0, "cpu": 0.05}
# Products in a row that are measured as one, so that the GPU never waits for the next.
_IN_A_ROW = {"cuda": 8, "cpu": 1}
# Copies of 64 MiB each way that are under way while products are measured beside them, and how often that is done. The
# copies take longer than the products, by far on a GPU with a fast link.
_COPIES, _REPEATS = 32, 5
_LAUNCHES = 200
# On a device that is nearly full, by how much smaller each try is. At a sixteenth a product still fills a large GPU.
_SMALLER = (1, 4, 16)


def calibrate(device: torch.device | str) -> Rates:
    """Measure a device; takes some five seconds on CUDA, about one on the CPU.

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
    bfloat16, slowed = _loaded(device, smaller)
    others = {d: _matmul(device, d, smaller) for d in _MATRIX_SIDE[device.type] if d != torch.bfloat16}
    return Rates(
        matmul_flops_per_s={
            str(d).removeprefix("torch."): rate for d, rate in ({torch.bfloat16: bfloat16} | others).items()
        },
        slowed_by_copies=slowed,
        memory_nbytes_per_s=_memory(device, smaller),
        launch_us=_launch(device),
        # twice, seconds apart, since others may use the link for a while, which only makes it look slower
        **{name: max(rate, links[name]) for name, rate in _links(device, smaller).items()},
    )


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _seconds(run: Callable[[], Any], device: torch.device, seconds: float | None = None, in_a_row: int = 1) -> float:
    """The median time of one call of ``run``, timed ``in_a_row``, over as many as fit the time for a measurement."""
    times: list[float] = []

    def several() -> None:
        for _ in range(in_a_row):
            run()

    for _ in range(2):
        elapsed_seconds(run, device)  # the first calls choose algorithms and fill pools
    end = time.perf_counter() + (_SECONDS[device.type] if seconds is None else seconds)
    while len(times) < 3 or time.perf_counter() < end:
        times.append(elapsed_seconds(several, device))
    return statistics.median(times) / in_a_row


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
    product, flops = _product(device, dtype, smaller)
    return flops / _seconds(product, device, in_a_row=_IN_A_ROW[device.type])


def _product(device: torch.device, dtype: torch.dtype, smaller: int) -> tuple[Callable[[], Any], int]:
    """A product of two square matrices, and its operations."""
    side = _MATRIX_SIDE[device.type][dtype] // math.isqrt(smaller)
    # Random values, because a GPU clocks higher on constants; from a generator of their own, so that no draw of the
    # program around is taken.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * side**3


def _memory(device: torch.device, smaller: int = 1) -> float:
    source = torch.ones(_BUFFER_NBYTES[device.type] // smaller, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def _loaded(device: torch.device, smaller: int = 1) -> tuple[float, float]:
    """The rate of products in bfloat16 under lasting load, and how many times as long they take beside copies."""
    product, flops = _product(device, torch.bfloat16, smaller)
    for _ in range(2):
        alone = _seconds(product, device, _LOAD_SECONDS[device.type], _IN_A_ROW[device.type])
    return flops / alone, _slowed(device, product, alone, smaller)


def _slowed(device: torch.device, product: Callable[[], Any], alone: float, smaller: int) -> float:
    """How many times as long products take while the link is busy both ways; 1 on the CPU, which copies nothing."""
    if device.type == "cpu":
        return 1.0
    in_a_row = _IN_A_ROW[device.type]
    traffic = _Traffic(device, 4 * smaller)  # beside the matrices

    def several() -> None:
        for _ in range(in_a_row):
            product()

    times = []
    for _ in range(_REPEATS):
        traffic.begin(_COPIES)
        times.append(elapsed_seconds(several, device) / in_a_row)
        traffic.join()
        torch.cuda.synchronize(device)
    return max(1.0, statistics.median(times) / alone)


class _Traffic:
    """Copies both ways between device and pinned host memory; on the CPU plain ones, which streams lower to there."""

    def __init__(self, device: torch.device, smaller: int) -> None:
        self.nbytes = _BUFFER_NBYTES[device.type] // smaller
        self._sides = [torch.cuda.Stream(), torch.cuda.Stream()] if device.type == "cuda" else []
        there, back = (
            pinned_zeros(self.nbytes, device) if self._sides else torch.ones(self.nbytes, dtype=torch.uint8)
            for _ in range(2)
        )
        into, out = (torch.ones(self.nbytes, dtype=torch.uint8, device=device) for _ in range(2))
        self._ways = ((into, there), (back, out))

    def one_way(self, way: int) -> None:
        """Copy to the device (0) or from it (1), on the current stream."""
        target, source = self._ways[way]
        target.copy_(source, non_blocking=True)

    def begin(self, copies: int) -> None:
        """Begin so many copies each way, behind the work of the current stream."""
        for way, side in enumerate(self._sides):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(copies):
                    self.one_way(way)

    def join(self) -> None:
        """Have the current stream wait for all copies."""
        for side in self._sides:
            torch.cuda.current_stream().wait_stream(side)

    def both_ways(self) -> None:
        """Copy both ways at once, as far as the device can."""
        self.begin(1)
        self.join()
        if not self._sides:
            self.one_way(0)
            self.one_way(1)


def _links(device: torch.device, smaller: int = 1) -> dict[str, float]:
    """Rates between host and device; on the CPU those of plain copies, which is what streams lower to there."""
    traffic = _Traffic(device, smaller)
    return {
        "host_to_device_nbytes_per_s": traffic.nbytes / _seconds(lambda: traffic.one_way(0), device),
        "device_to_host_nbytes_per_s": traffic.nbytes / _seconds(lambda: traffic.one_way(1), device),
        "both_ways_nbytes_per_s": traffic.nbytes / _seconds(traffic.both_ways, device),
    }


def _launch(device: torch.device) -> float:
    tiny = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(_LAUNCHES):
            tiny.add_(1)

    return _seconds(many, device) / _LAUNCHES * 1e6

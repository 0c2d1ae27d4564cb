"""Rates of a machine: how fast it multiplies matrices, moves bytes and starts kernels, measured once and cached.

The cache is a JSON object in ``${CHUNKFT_CACHE:-~/.cache/chunkft_fx}/rates.json``, one entry for each device,
torch version and driver. It only saves time: a damaged or unwritable file is measured around, and logged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("chunkft_fx.machine.rates")

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

_measured: dict[tuple[Path, str], Rates] = {}


@dataclass(frozen=True)
class Rates:
    """What one device does a second. ``matmul_flops_per_s`` is by dtype name (``"bfloat16"``), a multiply-add
    counting two.

    ``memory_nbytes_per_s`` counts bytes read plus bytes written in device memory. The host rates are for pinned
    memory, bytes one way; ``both_ways_nbytes_per_s`` is the rate *each way* with both directions busy.
    ``launch_us`` is what one more small kernel costs. All are positive and finite, else `ValueError`.
    """

    matmul_flops_per_s: dict[str, float]
    memory_nbytes_per_s: float
    host_to_device_nbytes_per_s: float
    device_to_host_nbytes_per_s: float
    both_ways_nbytes_per_s: float
    launch_us: float

    def __post_init__(self) -> None:
        if not self.matmul_flops_per_s:
            raise ValueError("matmul_flops_per_s is empty: give the rate of at least one dtype")
        figures = asdict(self)
        for name, figure in (figures.pop("matmul_flops_per_s") | figures).items():
            if isinstance(figure, bool) or not isinstance(figure, (int, float)):
                raise ValueError(f"{name}={figure!r} is not a number")
            if not (math.isfinite(figure) and figure > 0):
                raise ValueError(f"{name}={figure} must be positive and finite")


def rates(device: torch.device | str) -> Rates:
    """The rates of a device: from this process, else from the cache file, else measured (and written there)."""
    device = torch.device(device)
    path, key = cache_path(), device_key(device)
    if (path, key) not in _measured:
        found = _load(path).get(key)
        if found is None:
            found = calibrate(device)
            _store(path, key, found)
        _measured[path, key] = found
    return _measured[path, key]


def cache_path() -> Path:
    """Where the cache file is."""
    return Path(os.environ.get("CHUNKFT_CACHE") or "~/.cache/chunkft_fx").expanduser() / "rates.json"


def device_key(device: torch.device) -> str:
    """What measurements of a device depend on: its name, torch's version and the driver."""
    if device.type == "cuda":
        name, driver = torch.cuda.get_device_name(device), _cuda_driver()
    else:
        name, driver = f"{platform.node()} {platform.machine()}", f"{torch.get_num_threads()} threads"
    return f"{device.type} {name}, torch {torch.__version__}, {driver}"


def _cuda_driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        text = ""
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return f"driver {found[0] if found else 'unknown'}"


def _load(path: Path) -> dict[str, Rates]:
    """The readable entries of a cache file."""
    try:
        entries: Any = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s is not readable, rates are measured anew: %s", path, error)
        return {}
    if not isinstance(entries, dict):
        log.warning("%s does not hold an object, rates are measured anew", path)
        return {}
    found: dict[str, Rates] = {}
    for key, entry in entries.items():
        try:
            found[key] = Rates(**entry)
        except (TypeError, ValueError, AttributeError) as error:
            log.warning("%s: the entry %r is damaged and measured anew: %s", path, key, error)
    return found


def _store(path: Path, key: str, measured: Rates) -> None:
    """Add an entry; the file is replaced as a whole, so a reader never sees half of it."""
    entries = {k: asdict(r) for k, r in (_load(path) | {key: measured}).items()}
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(entries, indent=1))
        part.replace(path)
    except OSError as error:
        log.warning("%s cannot be written, rates are kept for this process only: %s", path, error)
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


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
    there, back = (torch.ones(nbytes, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2))
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

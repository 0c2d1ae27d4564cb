"""Decides which kernel computes a slice's weight gradient on this machine: the fastest, measured once a problem.

The candidates are the graph as traced (a copy of the slice, the library's product in the operands' dtype, and the
float32 copy in which gradients are added up), the library's product on the columns in place with a float32 result, and
each tiling of the Triton kernel. The answers are kept in this process and in the cache file ``kernels.json``.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkft_fx.kernels.weight_gradient import LIBRARY, TILINGS, Choose, Problem, has_kernel, launch, reference
from chunkft_fx.machine.cache import CacheFile, device_key
from chunkft_fx.machine.calibrate import elapsed_seconds

log = logging.getLogger("chunkft_fx.machine.kernel_choice")

# The environment variable that lets problems be measured.
SWITCH = "CHUNKFT_MEASURE_KERNELS"
# Of the time of the graph as traced, that a candidate must save: measurements of equal work differ by a percent or two.
LEAST_GAIN = 0.02
# Bytes that operands and results of a measurement may take: as much as the calibration of rates.
MOST_NBYTES = 600 * 2**20
# Microseconds that one candidate is run for, after one run that compiles it and one that says how long it takes.
_CANDIDATE_US = 1500
_MOST_RUNS = 30
# Columns beside the slice, so that its rows lie apart as in the matrix it is cut from.
_BESIDE = 64

# What computes each problem: a name for `chunkft_fx.kernels.weight_gradient`, or None for the graph as traced.
Decided = dict[Problem, str | None]


def _parsed(entry: Any) -> Decided:
    return {_problem(name): _by(value) for name, value in entry.items()}


def _plain(decided: Decided) -> dict[str, str | None]:
    return {_name(problem): by for problem, by in decided.items()}


def _name(problem: Problem) -> str:
    dtype = str(problem.dtype).removeprefix("torch.")
    return f"{problem.tokens} {problem.rows} {problem.columns} {problem.dim} {dtype}"


def _problem(name: str) -> Problem:
    """The problem that a line of the file names. Raises `ValueError` if it names none."""
    *numbers, dtype = name.split(" ")
    tokens, rows, columns, dim = map(int, numbers)
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or dim not in (0, 1):
        raise ValueError(f"{name!r} is no problem")
    return Problem(tokens, rows, columns, dim, kind)


def _by(value: Any) -> str | None:
    if value is None or value == LIBRARY or value in TILINGS:
        return value
    raise ValueError(f"{value!r} computes no gradients")


FILE = CacheFile("kernels.json", 1, _parsed, _plain)

# By file and device.
_known: dict[tuple[Path, str], Decided] = {}


def chooser(device: torch.device) -> Choose | None:
    """`choice` for a CUDA device where ``CHUNKFT_MEASURE_KERNELS=1``, else None: all graphs then run as traced.

    Problems are not measured by default, because each new one costs seconds while a model is compiled, and gradients of
    weights are a small part of a step with many chunks.
    """
    is_asked = device.type == "cuda" and os.environ.get(SWITCH) == "1"
    return functools.partial(choice, device) if is_asked else None


def choice(device: torch.device, problem: Problem) -> str | None:
    """Who computes a problem fastest: a name for `chunkft_fx.kernels.weight_gradient`, or None for the graph as traced.

    The first time a problem is asked for on a machine it is measured, which takes some 10 ms on an H200 (and a second
    or two for each kernel that Triton has not compiled before) and `operand_nbytes` of device memory, if these are
    free; if not, the answer is None for this process.
    """
    if not has_kernel(device, problem.dtype):
        return None
    path, key = FILE.path(), device_key(device)
    if (path, key) not in _known:
        _known[path, key] = FILE.load().get(key, {})
    known = _known[path, key]
    if problem not in known:
        reason = _too_large(device, problem)
        if reason is not None:
            log.info("%s is left to the library: %s", problem, reason)
            known[problem] = None
            return None
        found = _measured(device, problem)
        known[problem] = None if found is None else fastest(found)
        if found is not None:
            # beside what other processes have decided meanwhile
            FILE.store(key, FILE.load().get(key, {}) | {problem: known[problem]})
    return known[problem]


def fastest(times_us: dict[str | None, float]) -> str | None:
    """The fastest candidate if it saves `LEAST_GAIN` of the time of None, which is the graph as traced."""
    best = min(times_us, key=lambda by: times_us[by])
    return best if times_us[best] <= times_us[None] * (1 - LEAST_GAIN) else None


def operand_nbytes(problem: Problem) -> int:
    """Bytes that the measurement of a problem takes at its peak: operands, a copy of the slice, and results."""
    sizes = (problem.rows, problem.columns)
    result = problem.rows * problem.columns
    # tokens are split only where there are fewer tiles (32 Ki elements at most) than multiprocessors (some 150)
    partial = max(result, 2**23)
    elements = problem.tokens * (sum(sizes) + _BESIDE + sizes[problem.dim])
    return elements * problem.dtype.itemsize + (result + partial) * 4 + result * problem.dtype.itemsize


def _too_large(device: torch.device, problem: Problem) -> str | None:
    """Why a problem cannot be measured now, if it cannot."""
    nbytes = operand_nbytes(problem)
    if nbytes > MOST_NBYTES:
        return f"measuring it takes {nbytes} bytes, more than {MOST_NBYTES}"
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    # the process may be held to a budget; what the allocator keeps for later use is free too
    within = int(torch.cuda.get_per_process_memory_fraction(device) * total) - reserved
    free = min(free, within) + reserved - torch.cuda.memory_allocated(device)
    return f"measuring it takes {nbytes} bytes, and {free} are free" if nbytes > free else None


def _measured(device: torch.device, problem: Problem) -> dict[str | None, float] | None:
    """Microseconds of each candidate, None being the graph as traced; nothing at all if memory ran out."""
    try:
        with torch.no_grad(), torch.cuda.device(device):
            found = measure(problem, device)
    except torch.OutOfMemoryError as error:
        log.info("%s is left to the library, there is no memory to measure it: %s", problem, error)
        return None
    finally:
        torch.cuda.empty_cache()
    log.info("%s: %s us", problem, {by: round(us, 1) for by, us in found.items()})
    return found


def measure(problem: Problem, device: torch.device) -> dict[str | None, float]:
    """Microseconds of each candidate that runs on a CUDA device, one call after another on the current stream."""
    # Random values, because a GPU clocks higher on constants; from a generator of their own.
    generator = torch.Generator(device).manual_seed(0)

    def make(columns: int) -> Tensor:
        return torch.randn(problem.tokens, columns, device=device, dtype=problem.dtype, generator=generator)

    sizes = [problem.rows, problem.columns]
    length = sizes[problem.dim]
    sizes[problem.dim] += _BESIDE
    a, b = map(make, sizes)
    part = (a if problem.dim == 0 else b).narrow(1, _BESIDE, length)
    left, right = (part, b) if problem.dim == 0 else (a, part)

    def traced() -> Tensor:
        copied = part.clone(memory_format=torch.contiguous_format)
        product = torch.mm(copied.t(), b) if problem.dim == 0 else torch.mm(a.t(), copied)
        return product.float()

    times: dict[str | None, float] = {None: _us(traced, device), LIBRARY: _us(lambda: reference(left, right), device)}
    for by, tiling in TILINGS.items():
        try:
            times[by] = _us(functools.partial(launch, left, right, tiling), device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever Triton raises for a GPU that a tiling does not fit
            log.info("%s: the kernel %s does not run here: %s", problem, by, error)
    return times


def _us(run: Callable[[], Any], device: torch.device) -> float:
    """Microseconds of one of several calls in a row."""
    run()
    runs = max(2, min(_MOST_RUNS, int(_CANDIDATE_US / max(elapsed_seconds(run, device) * 1e6, 1.0))))

    def all_of_them() -> None:
        for _ in range(runs):
            run()

    return elapsed_seconds(all_of_them, device) / runs * 1e6

"""The budget as a limit: torch's allocator for a device is told never to reserve more.

What a plan did not foresee then ends in an error of the process that made the promise, not in more memory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

import torch

from chunkft_fx.torch_internals import release_workspaces, set_allocator

# Segments grow by pages of 20 MiB, and of 2 MiB for tensors up to 1 MiB.
PAGE_NBYTES, SMALL_PAGE_NBYTES = 20 * 2**20, 2 * 2**20
# The last pages are not full; there are two segments of the small kind, from before and after `avoid_fragmentation`.
PAGES_NBYTES = PAGE_NBYTES + 2 * SMALL_PAGE_NBYTES
# What may be taken beyond the block that is asked for.
PAGE_ROUNDING_NBYTES = PAGE_NBYTES - SMALL_PAGE_NBYTES
# Of the bytes that come and go in a step: what a caching allocator cannot use between blocks of other sizes. Up to 1.3%
# was measured (`benchmarks.bench_budget`).
FRAGMENTATION_SHARE = 0.02
# cuBLAS takes 32 MiB for each thread that multiplies (on Hopper; less before): forward's, and autograd's for backward.
LIBRARY_NBYTES = 2 * 32 * 2**20


def avoid_fragmentation(device: torch.device) -> None:
    """Let the caching allocator of a CUDA device grow its segments in place, unless the user has set it up otherwise.

    Steps of different chunks keep and free blocks of different sizes: between segments of fixed sizes up to a
    twentieth of a budget was lost. Memory that is allocated already stays where it is; cached memory is given back,
    else it would be what the next blocks are cut from, and with it the workspaces of cuBLAS, which would hold it.
    """
    settings = expandable(os.environ)
    if device.type == "cuda" and settings is not None and torch.cuda.get_allocator_backend() == "native":
        torch.cuda.synchronize(device)
        release_workspaces()
        torch.cuda.empty_cache()
        set_allocator(settings)


def expandable(environment: Mapping[str, str]) -> str | None:
    """The user's allocator settings with expandable segments added; None if they say something about these."""
    found = (environment.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    given = next(filter(None, found), "")
    if "expandable_segments" in given:
        return None
    return ",".join(filter(None, (given, "expandable_segments:True")))


def limit(device: torch.device, budget_bytes: int) -> None:
    """Give cached memory back, and from now on let no more than the budget be reserved on a CUDA device.

    The allocator compares its limit with the block that is asked for, and then takes whole pages: up to 18 MiB more.
    """
    if device.type != "cuda":
        return
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min((budget_bytes - PAGE_ROUNDING_NBYTES) / total, 1.0), device)


def take_workspaces(device: torch.device) -> None:
    """Have the product library take its workspaces now, for forward's thread and for autograd's.

    Taken in the middle of a step they would lie between blocks that come and go, and split their memory for good.
    """
    if device.type != "cuda":
        return
    with torch.enable_grad(), torch.autocast("cuda", enabled=False):
        matrix = torch.ones(16, 16, device=device, requires_grad=True)
        (matrix @ matrix).sum().backward()


def overhead(device: torch.device, step_nbytes: int) -> dict[str, int]:
    """Bytes by name that a device needs beside the tensors of a step of ``step_nbytes``."""
    if device.type != "cuda":
        return {}
    lost = PAGES_NBYTES + PAGE_ROUNDING_NBYTES + int(step_nbytes * FRAGMENTATION_SHARE)
    return {"library workspaces": LIBRARY_NBYTES, "fragmentation": lost}


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Say in an out-of-memory error that the budget is what it met."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(
            "chunkft_fx holds this process to the budget given to compile: raise it, or keep less on the device beside "
            "the model"
        )
        raise

"""The budget as a limit: torch's allocator for a device is told never to reserve more.

What a plan did not foresee then ends in an error of the process that made the promise, not in more memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# Of the bytes that come and go in a step: what a caching allocator cannot use between blocks of other sizes.
FRAGMENTATION_SHARE = 0.03
# cuBLAS takes 32 MiB for each thread that multiplies (on Hopper; less before): forward's, and autograd's for backward.
LIBRARY_NBYTES = 2 * 32 * 2**20


def limit(device: torch.device, budget_bytes: int) -> None:
    """Give cached memory back, and from now on let no more than the budget be reserved on a CUDA device."""
    if device.type != "cuda":
        return
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(budget_bytes / total, 1.0), device)


def overhead(device: torch.device, step_nbytes: int) -> dict[str, int]:
    """Bytes by name that a device needs beside the tensors of a step of ``step_nbytes``."""
    if device.type != "cuda":
        return {}
    return {"library workspaces": LIBRARY_NBYTES, "fragmentation": int(step_nbytes * FRAGMENTATION_SHARE)}


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Say in an out-of-memory error that the budget is what it met."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(
            "chunkft_fx holds this process to the budget given to compile: raise it, keep less on the device beside "
            "the model, or set PYTORCH_ALLOC_CONF=expandable_segments:True if much is reserved but unallocated"
        )
        raise

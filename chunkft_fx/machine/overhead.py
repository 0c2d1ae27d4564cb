"""Overhead: predicts the bytes that a device needs beside the tensors of a step, for workspaces and fragmentation."""

from __future__ import annotations

import torch

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


def overhead(device: torch.device, step_nbytes: int) -> dict[str, int]:
    """Bytes by name that a device needs beside the tensors of a step of ``step_nbytes``."""
    if device.type != "cuda":
        return {}
    lost = PAGES_NBYTES + PAGE_ROUNDING_NBYTES + int(step_nbytes * FRAGMENTATION_SHARE)
    return {"library workspaces": LIBRARY_NBYTES, "fragmentation": lost}

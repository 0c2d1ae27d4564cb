"""Predicts the bytes that a device needs beside the tensors of a step, for workspaces and fragmentation."""

from __future__ import annotations

import torch

# Segments grow by pages of 20 MiB, and of 2 MiB for tensors up to 1 MiB.
PAGE_NBYTES, SMALL_PAGE_NBYTES = 20 * 2**20, 2 * 2**20
# Slack in the last pages, which are filled in part: one page of the large kind and two of the small, since the segments
# of before and after `Limits.set_up` stay side by side.
PAGES_NBYTES = PAGE_NBYTES + 2 * SMALL_PAGE_NBYTES
# The allocator rounds a request up to whole pages, by up to this much.
PAGE_ROUNDING_NBYTES = PAGE_NBYTES - SMALL_PAGE_NBYTES
# The share of a step's bytes that lies unused between blocks of other sizes. Up to 1.3% was measured
# (`benchmarks.bench_budget`).
FRAGMENTATION_SHARE = 0.02
# Likewise of the largest workspace, where that is more: about one of the large tensors of a transformer block. Under a
# limit that does not leave it free the allocator gives back pages between tensors and takes them at the end again, each
# time behind all that the device has to do. 9.9% was measured once, with 4 layers of the Llama-2-7B shape at 32 x 1024;
# `benchmarks.bench_exact --unlimited` shows it.
WORKSPACE_SHARE = 0.1
# cuBLAS takes 32 MiB for each thread that multiplies (on Hopper; less before): forward's, and autograd's for backward.
LIBRARY_NBYTES = 2 * 32 * 2**20


def overhead(device: torch.device, step_nbytes: int, workspace_nbytes: int) -> dict[str, int]:
    """Bytes by name that a CUDA device needs beside the ``step_nbytes`` bytes of a step's tensors; none on the CPU.

    ``workspace_nbytes`` is the largest workspace of the step's region calls.
    """
    if device.type != "cuda":
        return {}
    between = max(step_nbytes * FRAGMENTATION_SHARE, workspace_nbytes * WORKSPACE_SHARE)
    lost = PAGES_NBYTES + PAGE_ROUNDING_NBYTES + int(between)
    return {"library workspaces": LIBRARY_NBYTES, "fragmentation": lost}

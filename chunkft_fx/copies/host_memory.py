"""Takes pinned host memory, tells how much there still is, and refuses gradients that would find too little of it.

Memory that the CUDA driver allocates is taken in pages of 4 KiB, one after another, which is slow. Here it is taken
from the system in huge pages, where it gives them, by several threads, and pinned in place.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from chunkft_fx.bytes import format_bytes
from chunkft_fx.errors import HostMemoryExceeded

# Bytes of a huge page: what is taken is a multiple of it.
PAGE_NBYTES = 2 * 2**20
# Of `cudaHostRegister`: every device may copy from this memory.
_PORTABLE = 1

# Read here because psutil knows no control groups, and in a container their limit is the one that is met.
CONTROL_GROUPS = Path("/sys/fs/cgroup")
# Of a control group: its limit, its use, and in its memory.stat the files' pages, which give way when asked for.
_LIMITS = (
    ("memory.max", "memory.current", "memory.stat", ("active_file", "inactive_file")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_active_file", "total_inactive_file"),
    ),
)


class _Pages(mmap.mmap):
    """Memory of the system that a device copies to and from by itself, for as long as someone holds it."""

    device: torch.device
    address = 0  # while it is pinned

    def pin(self, device: torch.device) -> None:
        """Let ``device`` copy from and to it."""
        address = torch.frombuffer(self, dtype=torch.uint8).data_ptr()
        error = int(torch.cuda.cudart().cudaHostRegister(address, len(self), _PORTABLE))
        if error:
            raise HostMemoryExceeded(
                f"{format_bytes(len(self))} of host memory cannot be pinned for {device} (CUDA error {error}); use a "
                "larger budget, with which less has to wait in host memory, states that take less, or a machine that "
                "lets more of its memory be pinned",
                len(self),
                available_nbytes(),
            )
        self.device, self.address = device, address

    def __del__(self) -> None:
        if not self.address or sys.is_finalizing():
            return
        try:
            torch.cuda.synchronize(self.device)  # copies may be under way
        finally:  # also behind an error of the device: the memory goes in any case
            torch.cuda.cudart().cudaHostUnregister(self.address)


def pinned_zeros(nbytes: int, device: torch.device) -> Tensor:
    """A uint8 tensor of ``nbytes`` zeros that ``device`` copies to and from by itself.

    Its memory is taken in whole pages of `PAGE_NBYTES`, and goes back to the system with the last tensor that views it.
    Raises `HostMemoryExceeded` if the system lets no such memory be pinned.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE") or not nbytes:
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
    pages = _Pages(-1, paged(nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    pages.madvise(mmap.MADV_DONTFORK)  # a forked process would have to copy all of it: pinned pages cannot be shared
    zeros = torch.frombuffer(pages, dtype=torch.uint8).zero_()  # has the system find the pages, with several threads
    pages.pin(device)
    return zeros[:nbytes]


def paged(nbytes: int) -> int:
    """Bytes of the whole pages that so many bytes take."""
    return -(-nbytes // PAGE_NBYTES) * PAGE_NBYTES


def require_room(gradients: int, others: int = 0) -> None:
    """Raise `HostMemoryExceeded` unless gradients of so many bytes can wait in host memory.

    ``others`` are bytes of optimizer states that are still to be taken.
    """
    limit = available_nbytes()
    if gradients + others > limit:
        beside = f", beside {format_bytes(others)} of optimizer states" if others else ""
        raise HostMemoryExceeded(
            f"gradients that wait in host memory for the optimizer's step take {format_bytes(gradients)} more of it"
            f"{beside}, available physical memory is {format_bytes(limit)}; use a budget with which they wait on the "
            'device, update="backward", which keeps none, states that take less (master="remainder", '
            'state_dtype="8bit"), one backward for a step, or a machine with more memory',
            gradients + others,
            limit,
        )


def available_nbytes() -> int:
    """Bytes of physical memory that can still be taken: the system's, or what a control group leaves of its limit."""
    left = [_left(*names) for names in _LIMITS]
    return min([_system_nbytes(), *(nbytes for nbytes in left if nbytes is not None)])


def _system_nbytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: all memory, since what is free says little about what can be had
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left(limit: str, usage: str, statistics: str, files: Sequence[str]) -> int | None:
    """What a control group leaves, None when there is none or it has no limit."""
    try:
        most = int((CONTROL_GROUPS / limit).read_text())
        taken = int((CONTROL_GROUPS / usage).read_text())
        lines = dict(line.split() for line in (CONTROL_GROUPS / statistics).read_text().splitlines())
    except (OSError, ValueError):  # ValueError: the limit is "max"
        return None
    return max(0, most - taken + sum(int(lines.get(f, 0)) for f in files))

"""Tells how much host memory can still be taken, and refuses gradients that would find too little to wait in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from chunkft_fx.bytes import format_bytes
from chunkft_fx.errors import HostMemoryExceeded

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
            'state_dtype="bfloat16"), one backward for a step, or a machine with more memory',
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

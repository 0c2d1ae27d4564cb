"""Pinned host memory: pinned in place, in whole pages, kept from forked processes, given back behind all copies."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chunkft_fx.copies.host_memory import PAGE_NBYTES, paged, pinned_zeros
from chunkft_fx.errors import HostMemoryExceeded

DEVICE = torch.device("cuda", 1)


class Runtime:
    """CUDA's runtime as far as pinning asks for it, in order."""

    def __init__(self, error: int = 0) -> None:
        self.error, self.calls = error, list[tuple[object, ...]]()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.calls.append(("register", address, nbytes, flags))
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister", address))
        return 0

    def synchronize(self, device: torch.device) -> None:
        self.calls.append(("synchronize", device))


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    found = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    monkeypatch.setattr(torch.cuda, "synchronize", found.synchronize)
    return found


def mapping(address: int) -> dict[str, str]:
    """What the system says of the memory at an address."""
    found: dict[str, str] = {}
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            begin, end = (int(x, 16) for x in first.split("-"))
            is_there = begin <= address < end
        elif is_there:
            found[first] = rest
    return found


def test_memory_is_pinned_in_place_and_kept_from_forked_processes(runtime: Runtime) -> None:
    zeros = pinned_zeros(PAGE_NBYTES + 3, DEVICE)
    assert (zeros.dtype, zeros.shape, bool(zeros.any())) == (torch.uint8, (PAGE_NBYTES + 3,), False)
    assert runtime.calls == [("register", zeros.data_ptr(), 2 * PAGE_NBYTES, 1)]
    flags = mapping(zeros.data_ptr())["VmFlags:"].split()
    assert "dc" in flags, "a forked process has no part of it"
    assert "hg" in flags, "huge pages are asked for"


def test_memory_goes_with_the_last_view_behind_all_copies(runtime: Runtime) -> None:
    zeros = pinned_zeros(16, DEVICE)
    address, view = zeros.data_ptr(), zeros[8:].view(torch.float32)
    del zeros
    gc.collect()
    assert len(runtime.calls) == 1
    view.fill_(2.0)
    del view
    gc.collect()
    assert runtime.calls[1:] == [("synchronize", DEVICE), ("unregister", address)]


def test_memory_that_cannot_be_pinned_is_no_memory(runtime: Runtime) -> None:
    runtime.error = 2
    with pytest.raises(HostMemoryExceeded, match=r"cannot be pinned for cuda:1 \(CUDA error 2\)"):
        pinned_zeros(16, DEVICE)
    gc.collect()
    assert [name for name, *_ in runtime.calls] == ["register"], "what was not pinned is not released either"


@given(st.integers(0, 2**40))
def test_bytes_are_rounded_up_to_whole_pages(nbytes: int) -> None:
    assert paged(nbytes) % PAGE_NBYTES == 0
    assert nbytes <= paged(nbytes) < nbytes + PAGE_NBYTES

"""Holds the process to its budget: torch's allocator for a device is told never to reserve more.

What a plan did not foresee then ends in an error of the process that made the promise, not in more memory. Several
models in one process may reserve the sum of their budgets.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping

import torch

from chunkft_fx.machine.overhead import PAGE_ROUNDING_NBYTES
from chunkft_fx.torch_internals import release_workspaces, set_allocator

# The setting of torch's allocator that is added, and how it is without.
SEGMENTS = "expandable_segments"
ADDED, DEFAULT = f"{SEGMENTS}:True", f"{SEGMENTS}:False"


class Allocator:
    """The calls to torch's caching allocator for CUDA. Other devices have no such allocator."""

    def fraction(self, device: torch.device) -> float:
        """The share of a device's memory that the process may reserve."""
        return float(torch.cuda.get_per_process_memory_fraction(device))

    def set_fraction(self, device: torch.device, fraction: float) -> None:
        """Let the process reserve at most this share (0 to 1) of a device's memory."""
        torch.cuda.set_per_process_memory_fraction(fraction, device)

    def total_nbytes(self, device: torch.device) -> int:
        """Bytes of a device's memory."""
        return int(torch.cuda.get_device_properties(device).total_memory)

    def is_native(self) -> bool:
        """Whether the allocator is torch's own: no other one has segments that grow."""
        return torch.cuda.get_allocator_backend() == "native"

    def set_up(self, settings: str) -> None:
        """Change settings of the process, written as in ``PYTORCH_ALLOC_CONF``."""
        set_allocator(settings)

    def give_back(self, device: torch.device) -> None:
        """Return cached memory to the device."""
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()

    def give_back_workspaces(self, device: torch.device) -> None:
        """Free the workspaces of cuBLAS, which hold cached memory."""
        torch.cuda.synchronize(device)
        release_workspaces()


class Limits:
    """The budgets of the models that live, device by device: together they are the allocator's limit.

    Models are held weakly. With the last of a device its limit becomes what it was before, and with the last of all
    the settings do.
    """

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator
        self._lock = threading.RLock()  # finalizers run whenever garbage is collected
        self._budgets: dict[torch.device, dict[int, int]] = {}
        self._before: dict[torch.device, float] = {}
        self._settings: str | None = None  # to go back to, once they were changed

    def set_up(self, owner: object, device: torch.device) -> None:
        """Let a CUDA device's allocator grow its segments in place, unless the user said otherwise.

        Steps of different chunks keep and free blocks of different sizes: between segments of fixed sizes up to a
        twentieth of a budget was lost. Memory that is allocated already stays where it is; cached memory is given back,
        else it would be what the next blocks are cut from, and with it the workspaces of cuBLAS, which would hold it.
        """
        if device.type != "cuda":
            return
        with self._lock:
            self._enter(owner, device)
            given = users_settings(os.environ)
            if self._settings is not None or SEGMENTS in given or not self._allocator.is_native():
                return
            self._allocator.give_back_workspaces(device)
            self._allocator.give_back(device)
            self._allocator.set_up(_with(given, ADDED))
            self._settings = _with(given, DEFAULT)

    def hold(self, owner: object, device: torch.device, budget_bytes: int) -> None:
        """Let no more than this model's budget and those of others be reserved on a CUDA device, while it lives.

        Cached memory is given back. The allocator compares its limit with the block that is asked for and then takes
        whole pages, up to 18 MiB more: so the limit is set that much below the budget.
        """
        if device.type != "cuda":
            return
        with self._lock:
            self._enter(owner, device)
            self._allocator.give_back(device)
            self._budgets[device][id(owner)] = budget_bytes
            self._apply(device)

    def _enter(self, owner: object, device: torch.device) -> None:
        held = self._budgets.setdefault(device, {})
        if not held:
            self._before[device] = self._allocator.fraction(device)
        if id(owner) not in held:
            held[id(owner)] = 0
            weakref.finalize(owner, self._leave, id(owner), device).atexit = False

    def _leave(self, owner: int, device: torch.device) -> None:
        with self._lock:
            held = self._budgets[device]
            del held[owner]
            if held:
                self._apply(device)
                return
            del self._budgets[device]
            self._allocator.set_fraction(device, self._before.pop(device))
            if not self._budgets and self._settings is not None:
                self._allocator.set_up(self._settings)
                self._settings = None

    def _apply(self, device: torch.device) -> None:
        budget = sum(tuple(self._budgets[device].values()))
        if budget:
            share = (budget - PAGE_ROUNDING_NBYTES) / self._allocator.total_nbytes(device)
            self._allocator.set_fraction(device, min(share, 1.0))


LIMITS = Limits(Allocator())


def users_settings(environment: Mapping[str, str]) -> str:
    """What the user set of the allocator."""
    found = (environment.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return next(filter(None, found), "")


def _with(given: str, setting: str) -> str:
    return ",".join(filter(None, (given, setting)))


def take_workspaces(device: torch.device) -> None:
    """Have cuBLAS take its workspaces now, one for the thread of the forward pass and one for autograd's.

    Workspaces that are taken in the middle of a step lie between blocks that are freed later, and split that memory.
    """
    if device.type != "cuda":
        return
    with torch.enable_grad(), torch.autocast("cuda", enabled=False):
        matrix = torch.ones(16, 16, device=device, requires_grad=True)
        (matrix @ matrix).sum().backward()


@contextlib.contextmanager
def explained(needed: Callable[[], str]) -> Iterator[None]:
    """Say in an out-of-memory error that the limit was the budget, and what the plan needs of it (``needed()``)."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(
            f"chunkft_fx holds this process to the budget given to compile: {needed()}. Raise the budget, or keep less "
            "on the device beside the model"
        )
        raise

"""Processes that are ranks of one group on this machine, kept for many tests because each takes seconds to start."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context

# A case that takes longer has a rank that waits for ever. Seconds.
LIMIT_S = 120


class World:
    """Ranks of a gloo group; `run` has each of them call the same function with the same arguments."""

    def __init__(self, size: int) -> None:
        self.size = size
        context = get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._ends: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            made = context.Process(target=_serve, args=(theirs, rank, size, self._folder.name), daemon=True)
            made.start()
            self._ends.append(ours)
            self.processes.append(made)

    def begin(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have every rank call a function of a module; `results` waits for it."""
        for end in self._ends:
            end.send((function, arguments))

    def results(self, limit_s: float = LIMIT_S) -> list[Any]:
        """By rank: what the function returned, or the exception that it raised."""
        found: list[Any] = []
        for rank, end in enumerate(self._ends):
            if not end.poll(limit_s):
                raise TimeoutError(f"rank {rank} of {self.size} has not answered within {limit_s} s")
            try:
                found.append(end.recv())
            except EOFError:
                found.append(ProcessLookupError(f"rank {rank} is gone"))
        return found

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What a function of a module returns on each rank; an exception of any of them is raised here."""
        self.begin(function, *arguments)
        found = self.results()
        for result in found:
            if isinstance(result, BaseException):
                raise result
        return found

    def close(self) -> None:
        """End the processes."""
        for made in self.processes:
            made.kill()
            made.join()
        self._folder.cleanup()


def _serve(end: Connection, rank: int, size: int, folder: str) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["CHUNKFT_VERIFY"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    while True:
        try:
            function, arguments = end.recv()
        except EOFError:
            return
        try:
            end.send(function(*arguments))
        except BaseException as error:
            traceback.print_exc()
            end.send(error)

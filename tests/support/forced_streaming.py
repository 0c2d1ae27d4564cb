"""Forced streaming: models compiled inside keep weights in host memory whatever their budget, and must fetch them.

On the CPU host memory is the device's own, so a program that read a streamed weight where it lies would be right
by accident. Here it fails: no region may be given a tensor that shares a streamed weight's storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from chunkft_fx.copies.residency import Residency
from chunkft_fx.copies.weight_ring import Ring
from chunkft_fx.plan.policy import DEPTH
from chunkft_fx.program.instructions import Instruction
from chunkft_fx.program.program import RegionCall
from chunkft_fx.runtime.step import Machine

# Which of a model's weights are streamed, given their names in the model's order. "mixed" has regions that fetch
# half of what they read, and, in the last third, regions that fetch nothing.
SHARES: dict[str, Callable[[list[str]], list[str]]] = {
    "all": lambda names: names,
    "mixed": lambda names: names[: -(-2 * len(names) // 3) : 2],
}
# Buffers of the ring: one is read while the next is filled.
LEAST_DEPTH = 2


@contextmanager
def streaming(share: str) -> Iterator[None]:
    """Stream this share of the weights of every model from its first training batch on; fails if none is fetched."""
    settle, fetch, run = Residency.settle, Ring.fetch, Machine.run
    settled: list[Residency] = []
    fetched: list[int] = []

    def settle_streamed(self: Residency, streamed: Iterable[str], depth: int) -> None:
        settle(self, SHARES[share](list(self.parameters)), max(depth, DEPTH))
        settled.append(self)

    def counted_fetch(self: Ring, host: Sequence[Tensor], buffer: int) -> list[Tensor]:
        fetched.append(len(host))
        return fetch(self, host, buffer)

    def guarded_run(self: Machine, instruction: Instruction, arguments: list[Any]) -> Sequence[Any]:
        if isinstance(instruction.call, RegionCall):
            hidden = {_place(r.real(name)) for r in settled for name in r.streamed}
            read = [a for a in arguments if isinstance(a, Tensor) and a.numel() and _place(a) in hidden]
            assert not read, f"{instruction.call.region.label} reads a streamed weight in host memory"
        return run(self, instruction, arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Residency, "settle", settle_streamed)
        patched.setattr(Ring, "fetch", counted_fetch)
        patched.setattr(Machine, "run", guarded_run)
        yield
    assert sum(fetched), "nothing was streamed"


@pytest.fixture(params=["resident", "streamed"])
def resident_or_streamed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Weights on the device, and in host memory."""
    if request.param == "resident":
        yield
        return
    with streaming("all"):
        yield


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

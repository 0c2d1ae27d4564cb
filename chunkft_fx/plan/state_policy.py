"""What a plan has to know of the optimizer: how wide its states are, and whether host memory keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from chunkft_fx.plan.state_spec import moment_dtype


class HasStates(Protocol):
    """An optimizer, as far as a plan knows it."""

    @property
    def state_dtype(self) -> str: ...

    @property
    def states(self) -> str: ...


@dataclass(frozen=True)
class StatePolicy:
    """AdamW's options ``state_dtype`` and ``states``."""

    dtype: str = "float32"
    states: str = "keep"

    @property
    def travels(self) -> bool:
        """Whether the states of a chunk are copied between host and device."""
        return self.states == "keep"

    def covers(self, other: StatePolicy) -> bool:
        """Whether memory planned for this is enough for the other."""
        return moment_dtype(self.dtype).itemsize >= moment_dtype(other.dtype).itemsize

    def nbytes(self, dtype: torch.dtype) -> int:
        """Optimizer-state bytes per element of a parameter: two moments, and a master for low precision."""
        wide = torch.promote_types(dtype, torch.float32)
        moments = wide if wide == torch.float64 else moment_dtype(self.dtype)
        return 2 * moments.itemsize + (wide.itemsize if wide != dtype else 0)


# What is planned for as long as no optimizer exists: none needs more.
ASSUMED = StatePolicy()


def policy_of(optimizer: HasStates | None) -> StatePolicy:
    """The policy of an optimizer, or that to assume without one."""
    return ASSUMED if optimizer is None else StatePolicy(optimizer.state_dtype, optimizer.states)

"""Holds the numbers that an optimizer keeps of a slice beside its tensors, such as ``step`` of torch's classes.

They are the same for all elements that were updated together, so they stand in the runs of `step_counts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Numbers by name, of one run of indices.
Numbers = tuple[tuple[str, float], ...]


class Number(NamedTuple):
    """A number by its name, and what an optimizer's class makes it: "int", "float", "bool", or a tensor's dtype."""

    name: str
    kind: str

    def made(self, value: float, device: torch.device | None = None) -> Any:
        """This number as the class makes it; a tensor is 0-d, and on the CPU if no device is given."""
        if self.kind in ("int", "float", "bool"):
            return {"int": int, "float": float, "bool": bool}[self.kind](value)
        return torch.tensor(value, dtype=getattr(torch, self.kind), device=device)


def number_of(name: str, value: Any) -> Number | None:
    """The number that a value in a class's state is; None if it is none."""
    if isinstance(value, bool | int | float):
        return Number(name, type(value).__name__)
    if type(value) is Tensor and value.ndim == 0 and not value.is_complex():
        return Number(name, str(value.dtype).removeprefix("torch."))
    return None


def numbers_in(state: Mapping[str, Any], known: tuple[Number, ...]) -> Numbers:
    """The values of these numbers in a class's state; waits for those on a GPU."""
    values = ((n.name, state[n.name]) for n in known)
    return tuple((name, v.item() if isinstance(v, Tensor) else v) for name, v in values)

"""Runs the update of an optimizer whose arithmetic is torch's own, a bounded part of the active slices at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from chunkft_fx.optim.optimizer import ChunkedOptimizer
from chunkft_fx.optim.update import Part, PartsUpdate, StagedSlice, Update


class PartsOptimizer(ChunkedOptimizer):
    """An optimizer that is one function over `optim.update.Part`."""

    @abstractmethod
    def update(self, parts: Sequence[Part], options: Mapping[str, Any]) -> None:
        """One step on these parts, in place, with a group's options: the optimizer's arithmetic."""

    def prepare(
        self, entries: Sequence[StagedSlice], options: Mapping[str, Any], scale: Tensor | None, seed: int
    ) -> Update:
        return PartsUpdate(self.update, self.spec, entries, options, scale)

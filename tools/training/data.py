"""Gives the rows of a data set batch by batch, in an order that a seed and a position decide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chunkft_fx.errors import CheckpointMismatch, DataError
from chunkft_fx.tools.data.rows import Batch, Rows


@dataclass
class Batches:
    """Endless batches of ``rows``, ``shuffled`` in a new order from ``seed`` each epoch, or as they stand.

    ``position`` is the number of batches dealt so far: with the same rows, batch size and seed it is
    all that a resumed run needs. The last rows of an epoch that fill no batch are left out.
    """

    rows: Rows
    batch_size: int
    seed: int
    shuffled: bool = True
    position: int = 0
    _order: tuple[int, Tensor] = field(default=(-1, torch.empty(0)), repr=False)

    def __post_init__(self) -> None:
        if self.batch_size > len(self.rows):
            raise DataError(
                f"the text fills {len(self.rows)} sequences, fewer than a batch of {self.batch_size}; "
                "lower --batch-size or --seq-len"
            )

    @property
    def in_epoch(self) -> int:
        """How many batches an epoch has."""
        return len(self.rows) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        epoch, index = divmod(self.position, self.in_epoch)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            count = len(self.rows)
            self._order = epoch, torch.randperm(count, generator=generator) if self.shuffled else torch.arange(count)
        chosen = self._order[1][index * self.batch_size : (index + 1) * self.batch_size]
        batch = self.rows.batch(chosen.tolist(), self.position)
        self.position += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, and over what it counts: ``text`` is a digest of the tokens."""
        return {
            "position": self.position,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffled": self.shuffled,
            "sequences": len(self.rows),
            "length": self.rows.length,
            "text": self.rows.digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a run over the same rows was saved; raises `CheckpointMismatch` for others."""
        state = {"shuffled": True, **state}  # a run of before there was a choice
        changed = {k: v for k, v in self.state_dict().items() if k != "position" and state.get(k) != v}
        if changed:
            saved = ", ".join(f"{k} {state.get(k)} (now {v})" for k, v in changed.items())
            raise CheckpointMismatch(f"the checkpoint was saved with other data: {saved}; resume with the same")
        position = state.get("position")
        if not isinstance(position, int) or position < 0:
            raise CheckpointMismatch(f"the checkpoint's position in the data is {position!r}, not a count of batches")
        self.position = position

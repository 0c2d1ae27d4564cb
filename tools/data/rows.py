"""Gives rows of a data set as batches for a model: packed or padded, with what is learned and where documents begin."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from chunkft_fx.tools.data.packing import fill

# The label of a token that is not learned, as torch's and transformers' losses have it.
IGNORED = -100
# Documents of which a digest reads the tokens; of all it has the lengths.
SAMPLED = 4096
# Rows without packing are as long as the longest, rounded up to this: widths that kernels like.
ROUND = 8

Batch = dict[str, Tensor]


class Rows(Protocol):
    """Rows of equal length: ``length`` tokens each."""

    length: int

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int], position: int) -> Batch:
        """Some rows as a model's keyword arguments; ``position`` in the run decides what is drawn at random."""
        ...

    @property
    def digest(self) -> str:
        """The same for the same tokens in the same rows."""
        ...


class Sequences:
    """Rows that are in memory as one tensor, ``i64[count, length]``, all of it learned."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self.length = ids.shape[1]

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int], position: int) -> Batch:
        ids = self.ids[torch.as_tensor(rows)]
        return {"input_ids": ids, "labels": ids}

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.ids.contiguous().numpy().data).hexdigest()[:16]


@dataclass(frozen=True)
class Pieces:
    """Pieces of a data set (`stored`): which of them, in which order, and how many tokens each has."""

    data: Any
    chosen: np.ndarray[Any, np.dtype[np.int64]]

    @functools.cached_property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        import pyarrow.compute

        found = pyarrow.compute.list_value_length(self.data.data.column("ids")).to_numpy()
        return found[self.chosen].astype(np.int64)

    @property
    def largest(self) -> int:
        """The largest token of the whole data set."""
        import pyarrow.compute

        return int(pyarrow.compute.max(pyarrow.compute.list_flatten(self.data.data.column("ids"))).as_py() or 0)

    @property
    def empty(self) -> int:
        """How many documents of the whole data set have nothing that can be learned."""
        import pyarrow.compute

        lengths = pyarrow.compute.list_value_length(self.data.data.column("ids"))
        return int(pyarrow.compute.sum(pyarrow.compute.equal(lengths, 0)).as_py() or 0)

    def total(self, column: str) -> int:
        """The sum of a column of counts over all pieces of the data set."""
        import pyarrow.compute

        return int(pyarrow.compute.sum(self.data.data.column(column)).as_py() or 0)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """The tokens of a piece and the labels of each: its first token has nothing that it could be learned from."""
        entry = self.data[int(self.chosen[i])]
        ids = torch.tensor(entry["ids"], dtype=torch.int64)
        learned = torch.tensor(entry["learned"], dtype=torch.bool)
        learned[:1] = False
        return ids, ids.masked_fill(~learned, IGNORED)

    def label(self, i: int) -> str:
        """The label of a piece's document."""
        return str(self.data[int(self.chosen[i])]["label"])

    @functools.cached_property
    def digest(self) -> str:
        """Of the lengths of all pieces, and the tokens of pieces spread over them."""
        found = hashlib.sha256(self.lengths.tobytes())
        for i in np.unique(np.linspace(0, len(self.chosen) - 1, SAMPLED).astype(np.int64)):
            entry = self.data[int(self.chosen[i])]
            found.update(np.array([*entry["ids"], *entry["learned"]], dtype=np.int32).tobytes())
            found.update(entry["label"].encode())
        return found.hexdigest()[:16]


def block_mask(positions: Tensor, causal: bool) -> Tensor:
    """Which token sees which, ``bool[rows, 1, length, length]``: those of its document, with ``causal`` of before."""
    document = (positions == 0).cumsum(-1)
    mask = document[:, None, :, None] == document[:, None, None, :]
    return mask.tril() if causal else mask


class Packed:
    """Rows of several documents each: position ids begin anew with each of them, and with the padding at the end.

    ``mask`` is `block_mask` where the model needs one.
    """

    def __init__(self, pieces: Pieces, length: int, pad: int) -> None:
        self.pieces, self.length, self.pad = pieces, length, pad
        self.mask: Callable[[Tensor], Tensor] | None = None
        rows = list(fill(pieces.lengths.tolist(), length))
        # flat, since lists of lists take ten times the memory
        self._members = np.array([i for row in rows for i in row], dtype=np.int64)
        self._ends = np.cumsum([len(row) for row in rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def batch(self, rows: Sequence[int], position: int) -> Batch:
        made = [self._row(int(row)) for row in rows]
        batch = {name: torch.stack([row[name] for row in made]) for name in made[0]}
        return batch if self.mask is None else batch | {"attention_mask": self.mask(batch["position_ids"])}

    def _row(self, row: int) -> Batch:
        first = int(self._ends[row - 1]) if row else 0
        parts = [self.pieces[int(i)] for i in self._members[first : int(self._ends[row])]]
        room = self.length - sum(len(ids) for ids, _ in parts)
        if room:
            parts.append((torch.full((room,), self.pad), torch.full((room,), IGNORED)))
        return {
            "input_ids": torch.cat([ids for ids, _ in parts]),
            "labels": torch.cat([labels for _, labels in parts]),
            "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in parts]),
        }

    @property
    def digest(self) -> str:
        return self.pieces.digest


class Padded:
    """Rows of a document each, padded at the end; with ``classes`` the label is the document's."""

    def __init__(self, pieces: Pieces, length: int, pad: int, classes: Mapping[str, int] | None = None) -> None:
        self.pieces, self.pad, self.classes = pieces, pad, classes
        self._chosen = np.flatnonzero(pieces.lengths)
        longest = int(pieces.lengths.max(initial=1))
        self.length = min(length, -(-longest // ROUND) * ROUND)

    def __len__(self) -> int:
        return len(self._chosen)

    def batch(self, rows: Sequence[int], position: int) -> Batch:
        made = [self._row(int(self._chosen[int(row)])) for row in rows]
        return {name: torch.stack([row[name] for row in made]) for name in made[0]}

    def _row(self, piece: int) -> Batch:
        ids, labels = self.pieces[piece]
        room = self.length - len(ids)
        row = {
            "input_ids": torch.nn.functional.pad(ids, (0, room), value=self.pad),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (0, room)),
        }
        if self.classes is not None:
            return row | {"labels": torch.tensor(self.classes[self.pieces.label(piece)])}
        return row | {"labels": torch.nn.functional.pad(labels, (0, room), value=IGNORED)}

    @property
    def digest(self) -> str:
        return self.pieces.digest


def learned_count(batch: Batch, shifted: bool) -> int:
    """How many labels a batch's loss is the mean of; ``shifted`` if a token's label is learned at the one before it."""
    labels = batch["labels"]
    return int(((labels[:, 1:] if shifted else labels) != IGNORED).sum())

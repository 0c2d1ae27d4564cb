"""Reads token ids, and cuts them into the sequences that are trained on and those that are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # the label of a token that no loss counts


@dataclass(frozen=True)
class Sequences:
    """Token ids and labels, ``i64[count, length]`` both; labels are ids, or `IGNORED`."""

    ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Tensor | slice, device: torch.device) -> dict[str, Tensor]:
        """Arguments of the model for some rows."""
        return {"input_ids": self.ids[rows].to(device), "labels": self.labels[rows].to(device)}

    def counted(self, rows: slice) -> int:
        """How many labels the losses of these rows are means of: the first token of a sequence is never foretold."""
        return int((self.labels[rows, 1:] != IGNORED).sum())


@dataclass(frozen=True)
class Text:
    """What is trained on and what is held out, and a digest of both."""

    training: Sequences
    held_out: Sequences
    digest: str


def text_of(arrays: Mapping[str, Any], length: int, held_out: int) -> Text:
    """Cut the flat arrays ``train`` and ``val``; where ``train_counts`` and ``val_counts`` are false is no label."""
    digest = hashlib.sha256()
    cut = []
    for key in ("train", "val"):
        flat = np.asarray(arrays[key]).astype(np.int64)
        counts = arrays[f"{key}_counts"] if f"{key}_counts" in arrays else np.ones(len(flat), bool)
        digest.update(flat.tobytes())
        digest.update(np.asarray(counts).tobytes())
        whole = len(flat) // length * length
        ids = torch.from_numpy(flat[:whole]).view(-1, length)
        labels = ids.masked_fill(~torch.from_numpy(np.asarray(counts)[:whole]).view(-1, length), IGNORED)
        cut.append(Sequences(ids, labels))
    training, rest = cut
    if len(rest) < held_out or not len(training):
        raise ValueError(f"there are {len(training)} sequences to train on and {len(rest)} of {held_out} to hold out")
    return Text(training, Sequences(rest.ids[:held_out], rest.labels[:held_out]), digest.hexdigest()[:12])


def read_text(path: Path, length: int, held_out: int) -> Text:
    """The text of an ``.npz`` file."""
    with np.load(path) as arrays:
        return text_of(arrays, length, held_out)

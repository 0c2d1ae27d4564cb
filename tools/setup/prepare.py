"""Prepares the data of a run: from files to the rows that are trained on and those that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from chunkft_fx.errors import DataError, OptionError
from chunkft_fx.tools.data.rows import Packed, Padded, Pieces, Rows, block_mask
from chunkft_fx.tools.data.store import Reading, stored
from chunkft_fx.tools.models.tasks import Masked, class_numbers


@dataclass(frozen=True)
class DataOptions:
    """Which data a run has, and how it is read: ``held_out`` files or a ``share`` of the data are scored on."""

    sources: Sequence[str]
    reading: Reading
    packing: bool = True
    held_out: Sequence[str] = ()
    share: float = 0.0

    def __post_init__(self) -> None:
        if not self.sources:
            raise OptionError("there is no data; give files, a folder or a name on the hub behind MODEL")
        if not 0 <= self.share < 1:
            raise OptionError(f"eval-split is {self.share}; it must be a share of the data below 1")
        if self.share and self.held_out:
            raise OptionError("eval and eval-split both say what is held out; give one of them")


@dataclass(frozen=True)
class Prepared:
    """The rows of a run, its classes if there are any, and lines that say what was made of the data."""

    rows: Rows
    held_out: Rows | None
    classes: dict[str, int] | None
    largest: int
    lines: tuple[str, ...]

    def give_masks(self, causal: bool) -> None:
        """Have the documents of each row kept apart by masks, for a model that needs them."""
        for rows in (self.rows, self.held_out):
            packed = rows.rows if isinstance(rows, Masked) else rows
            if isinstance(packed, Packed):
                packed.mask = partial(block_mask, causal=causal)


def prepare(tokenizer: Any, config: Any, data: DataOptions, task: str, seed: int) -> Prepared:
    """Read, tokenize and pack all data of a run. Raises `DataError` for whatever cannot be used."""
    everything = stored(data.sources, tokenizer, data.reading)
    training, held = _split(everything, data.share, seed)
    if data.held_out:
        other = stored(data.held_out, tokenizer, data.reading)
        held, _ = _split(other, 0.0, seed)
    classes = class_numbers(Pieces(everything, training.chosen), config) if task == "classification" else None
    if classes is not None and held is not None:
        _check_classes(held, classes)

    def rows(pieces: Pieces) -> Rows:
        if not len(pieces.chosen):
            raise DataError(_nothing(data, pieces.total("cut")))
        pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
        is_packed = data.packing and task != "classification"
        made = (
            Packed(pieces, data.reading.length, pad) if is_packed else Padded(pieces, data.reading.length, pad, classes)
        )
        return Masked(made, tokenizer, seed) if task == "masked" else made

    made, scored = rows(training), rows(held) if held is not None else None
    largest = max(pieces.largest for pieces in (training, held) if pieces is not None)
    return Prepared(made, scored, classes, largest, tuple(_lines(training, held, made)))


def _split(data: Any, share: float, seed: int) -> tuple[Pieces, Pieces | None]:
    """A share of the documents by chance, all pieces of each; of a single document, its last pieces."""
    filled = np.flatnonzero(Pieces(data, np.arange(len(data))).lengths)
    if not share or not len(filled):
        return Pieces(data, filled), None
    documents = np.asarray(data.data.column("document").to_numpy())[filled]
    names = np.unique(documents)
    if len(names) > 1:
        draw = np.random.default_rng(seed).permutation(names)[: max(1, round(share * len(names)))]
        is_held = np.isin(documents, draw)
    else:
        is_held = np.arange(len(filled)) >= len(filled) - max(1, round(share * len(filled)))
    if is_held.all():
        raise DataError(f"eval-split is {share}, which leaves nothing of so little data to train on; give --eval FILE")
    return Pieces(data, filled[~is_held]), Pieces(data, filled[is_held])


def _nothing(data: DataOptions, cut: int) -> str:
    """Why there is nothing to train on: ``cut`` tokens were too far behind to fit in a row."""
    named = ", ".join(data.sources)
    if cut:
        return (
            f"{named} holds nothing to learn within the first {data.reading.length} tokens of any document: prompts "
            "take them, and replies lie behind; raise --seq-len, or give --train-on-prompts"
        )
    return f"{named} holds no text to learn; give a file with text to train on"


def _check_classes(held: Pieces, classes: dict[str, int]) -> None:
    unknown = sorted(set(held.data.data.column("label").to_pylist()) - classes.keys())
    if unknown:
        raise DataError(
            f"the held-out data has the labels {', '.join(unknown[:8])}, which none of the training data has"
        )


def _lines(training: Pieces, held: Pieces | None, rows: Rows) -> list[str]:
    tokens = int(training.lengths.sum())
    fill = tokens / (len(rows) * rows.length)
    lines = [
        f"{tokens:,} tokens in {len(training.lengths):,} pieces of documents, "
        f"{len(rows):,} rows of {rows.length} ({fill:.0%} full)"
    ]
    if held is not None:
        lines.append(f"{int(held.lengths.sum()):,} tokens in {len(held.lengths):,} pieces are held out")
    notes = {
        "cut": "tokens were left off the ends of documents that are longer than --seq-len",
        "lost": "turns of the assistant are not learned: the chat template writes them otherwise once more follow",
    }
    lines += [f"{count:,} {text}" for name, text in notes.items() if (count := training.total(name))]
    if empty := training.empty:
        lines.append(f"{empty:,} documents are left out: nothing can be learned from them")
    return lines

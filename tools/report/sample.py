"""Describes a row of a batch: its documents one by one, and what of each is learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chunkft_fx.tools.data.rows import IGNORED, Batch

# Of a run of tokens so many characters are shown, from both its ends.
SHOWN = 160


def describe(batch: Batch, tokenizer: Any) -> list[str]:
    """The first row of a batch as lines: ``+`` in front of what is learned, ``-`` of what is not."""
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    if not labels.dim():
        kept = ids[batch["attention_mask"][0].bool()]
        return [f"label {int(labels)}: {_text(kept, tokenizer)}", *_padding(len(ids) - len(kept))]
    is_packed = "position_ids" in batch
    used = len(ids) if is_packed or "attention_mask" not in batch else int(batch["attention_mask"][0].sum())
    starts = torch.nonzero(batch["position_ids"][0] == 0).flatten().tolist() if is_packed else [0]
    lines: list[str] = []
    for i, start in enumerate(starts):
        stop = starts[i + 1] if i + 1 < len(starts) else used
        part, learned = ids[start:stop], labels[start:stop] != IGNORED
        if is_packed and i and i + 1 == len(starts) and not learned.any():
            return [*lines, *_padding(stop - start)]
        lines.append(f"document {i + 1}, tokens {start} to {stop - 1}, {int(learned.sum())} of {stop - start} learned")
        lines += [f"  {'+' if is_learned else '-'} {_text(run, tokenizer)}" for run, is_learned in _runs(part, learned)]
    return [*lines, *_padding(len(ids) - used)]


def _runs(ids: Tensor, learned: Tensor) -> list[tuple[Tensor, bool]]:
    """Tokens side by side that are all learned, or all not."""
    borders = (torch.nonzero(learned[1:] != learned[:-1]).flatten() + 1).tolist()
    return [(ids[a:b], bool(learned[a])) for a, b in zip([0, *borders], [*borders, len(ids)], strict=True)]


def _text(ids: Tensor, tokenizer: Any) -> str:
    text = repr(str(tokenizer.decode(ids.tolist())))
    if len(text) <= 2 * SHOWN:
        return text
    return f"{text[:SHOWN]} ... {text[-SHOWN:]}"


def _padding(count: int) -> list[str]:
    return [f"padding, {count} tokens"] if count else []

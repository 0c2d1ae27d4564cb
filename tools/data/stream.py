"""Cuts texts into sequences of equal length, one behind the other: for text in memory that is learned as one stream."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chunkft_fx.errors import DataError
from chunkft_fx.tools.data.formats import Text
from chunkft_fx.tools.data.tokens import tokenized, written


def pack(documents: Sequence[str], tokenizer: Any, length: int) -> Tensor:
    """All documents as one token stream, cut into ``i64[sequences, length]``.

    Each document gets the special tokens that the tokenizer itself adds, and an end-of-text token behind it; neither is
    doubled where the text already has it. Where all documents begin with the tokenizer's first token, each sequence
    does, also one in the middle of a document: models that were trained that way go wrong without it. The remainder
    that fills no sequence is dropped. Raises `DataError` when not even one is filled.
    """
    if length < 2:
        raise DataError(
            f"sequences of {length} token(s) teach nothing: each is learnt from those before; raise --seq-len"
        )
    whole = [written(f"text {i}", Text(d), tokenizer) for i, d in enumerate(documents)]
    tokens = [piece.ids for piece in tokenized(whole, tokenizer)]
    begin = tokenizer.bos_token_id
    first = [begin] if begin is not None and all(ids[:1] == [begin] for ids in tokens) else []
    stream = list(itertools.chain.from_iterable(tokens))
    rows: list[list[int]] = []
    done = 0
    while done < len(stream):
        row = [] if stream[done : done + 1] == first else first
        taken = length - len(row)
        rows.append(row + stream[done : done + taken])
        done += taken
    if rows and len(rows[-1]) < length:
        rows.pop()
    if not rows:
        raise DataError(f"the text has {len(stream)} tokens, too few for one sequence of {length}; lower --seq-len")
    return torch.tensor(rows, dtype=torch.int64)

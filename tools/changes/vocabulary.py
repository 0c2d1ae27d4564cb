"""Makes room in a tokenizer and a model for tokens that they did not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chunkft_fx.errors import OptionError

# Rows of embeddings come in multiples of this: widths that kernels like.
MULTIPLE = 64


def add_tokens(tokenizer: Any, plain: Sequence[str], special: Sequence[str]) -> list[str]:
    """Have a tokenizer read each of these as one token; ``special`` ones are left out of what ``chat`` prints.

    Gives a line that says how many are new; those that it has already stay as they are.
    """
    if not plain and not special:
        return []
    both = set(plain) & set(special)
    if both:
        raise OptionError(f"{', '.join(sorted(both))} is in add-tokens and in add-special-tokens; give it once")
    known = len(plain) + len(special)
    new = tokenizer.add_tokens(list(plain)) + tokenizer.add_tokens(list(special), special_tokens=True)
    had = f"; it had {known - new} already" if new < known else ""
    return [f"{new} tokens are new to the tokenizer, of {len(tokenizer)} now{had}"]


def fitted(tokens: int, rows: int) -> int:
    """How many embeddings a model of ``rows`` has once it has some for so many tokens."""
    return rows if tokens <= rows else -(-tokens // MULTIPLE) * MULTIPLE


def fit_embeddings(model: Any, tokens: int, draw: bool = True) -> None:
    """Give a model embeddings for so many tokens, if it has fewer, and the head its rows.

    transformers draws the new ones about the mean of the old, with their covariance, unless they are not to be drawn.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    if tokens > rows:
        model.resize_token_embeddings(fitted(tokens, rows), mean_resizing=draw)

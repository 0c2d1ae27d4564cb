"""Computes NEFTune's noise: what a model's embeddings give is moved at random while it is trained.

As transformers does it (arXiv 2310.05914), between bounds of ``alpha / sqrt(length * width)``. The length is that of
the row, with its padding; in a row of several documents it is that of all of them.
"""

from __future__ import annotations

from typing import Any

from chunkft_fx.errors import OptionError


def add_noise(model: Any, alpha: float) -> None:
    """Have the embeddings of a model's tokens give noise too, in training mode; `OptionError` where there are none."""
    from chunkft_fx.trainers.noise import noisy  # here, because it takes transformers' Trainer along

    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    if embedding is None:
        raise OptionError(
            f"neftune-noise-alpha adds noise to embeddings, and a {type(model).__name__} does not say which it has; "
            "leave it out"
        )
    embedding.neftune_noise_alpha = alpha
    embedding.register_forward_hook(noisy)

"""Rewrites the hook by which a Trainer adds NEFTune's noise, so that it is traced with sequences of any length.

The noise lies between bounds that depend on the length. transformers gives them to ``uniform_`` as numbers, of which
nothing is known where lengths vary, and the model could not be traced. Here they are a tensor, by which noise between
-1 and 1 is multiplied: the same random numbers, up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations.neftune import neftune_post_forward_hook


class TraceableNoise(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Puts our hook in the place of transformers' as soon as that is there; the Trainer takes it away as its own."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Look for the hook on the model's embedding."""
        if args.neftune_noise_alpha is None:
            return
        hooks = model.get_input_embeddings()._forward_hooks
        for key, hook in hooks.items():
            if hook is neftune_post_forward_hook:
                hooks[key] = noisy


def noisy(module: Any, inputs: Any, output: Tensor) -> Tensor:
    """A hook on an embedding: what it gives (``[rows, length, width]``) with noise while its module trains.

    The noise lies between bounds of ``module.neftune_noise_alpha / sqrt(length * width)`` (arXiv 2310.05914).
    """
    if not module.training:
        return output
    size = torch.full((), output.size(1) * output.size(2), dtype=torch.float32, device=output.device)
    bound = module.neftune_noise_alpha / size.sqrt()
    return output + (torch.rand_like(output) * 2 - 1) * bound.to(output.dtype)

"""Checks which changes of a model a run asks for, and makes them on the plain model, before it is compiled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from chunkft_fx.errors import OptionError
from chunkft_fx.tools.changes.frozen import freeze
from chunkft_fx.tools.changes.noise import add_noise
from chunkft_fx.tools.changes.smoothing import smooth_labels


@dataclass(frozen=True)
class ModelChanges:
    """The changes of a run: which parameters it trains, tokens it adds, noise, smoothed labels, entries of the config.

    ``freeze`` and ``train_only`` are patterns of names (`frozen.fits`).
    """

    freeze: tuple[str, ...] = ()
    train_only: tuple[str, ...] = ()
    add_tokens: tuple[str, ...] = ()
    add_special_tokens: tuple[str, ...] = ()
    neftune_noise_alpha: float = 0.0
    label_smoothing: float = 0.0
    model_config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.neftune_noise_alpha) and self.neftune_noise_alpha >= 0):
            raise OptionError(
                f"neftune-noise-alpha is {self.neftune_noise_alpha}; give 0 for no noise, or a number such as 5"
            )
        if not 0 <= self.label_smoothing < 1:
            raise OptionError(f"label-smoothing is {self.label_smoothing}; it must be a share below 1, such as 0.1")
        for name in ("freeze", "train_only", "add_tokens", "add_special_tokens"):
            if not all(text.strip() for text in getattr(self, name)):
                raise OptionError(f"{name.replace('_', '-')} is empty; leave it out")

    @property
    def adds_tokens(self) -> bool:
        """Whether the tokenizer and the embeddings grow."""
        return bool(self.add_tokens or self.add_special_tokens)

    def lasting(self) -> dict[str, Any]:
        """All of them, as JSON has them: a run that is resumed has the same."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def make(self, model: nn.Module, task: str, can_run: bool = True) -> list[str]:
        """Make those that hold for any model with weights; gives lines that say what was done.

        ``can_run`` says that there are weights to try the model with. Raises `OptionError` for what it cannot do.
        """
        lines = freeze(model, self.freeze, self.train_only)
        if self.neftune_noise_alpha:
            add_noise(model, self.neftune_noise_alpha)
            lines.append(f"embeddings have noise of alpha {self.neftune_noise_alpha:g} while they are trained")
        if self.label_smoothing:
            smooth_labels(model, self.label_smoothing, task, can_run)
            lines.append(f"labels are smoothed by {self.label_smoothing:g}, but in scores")
        return lines

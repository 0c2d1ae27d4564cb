"""Keeps NaN and infinity out of the losses that a Trainer logs, as it does by itself, but without a wait for the GPU.

With ``logging_nan_inf_filter``, its default, a Trainer reads each step's loss between backward and optimizer step: it
waits until the GPU has done all of the step, and the GPU then rests while the host prepares the update and the next
forward. Here the same choice is made on the device. The argument is False only while the Trainer would look at it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback


class LossFilter(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Takes the place of a trainer's ``training_step``, whose loss it filters."""

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._training_step = trainer, trainer.training_step
        trainer.training_step, self._is_put_off = self._filtered, False

    def _filtered(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = self._training_step(*args, **kwargs)
        trainer = self._trainer
        so_far = getattr(trainer, "_tr_loss", None)  # the sum of losses since the last log
        if so_far is None or not trainer.args.logging_nan_inf_filter:
            return loss
        trainer.args.logging_nan_inf_filter, self._is_put_off = False, True
        mean = so_far / (1 + trainer.state.global_step - trainer._globalstep_last_logged)
        return torch.where(loss.isfinite(), loss, mean)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Behind a loss that was looked at: give the argument back."""
        if self._is_put_off:
            args.logging_nan_inf_filter, self._is_put_off = True, False

    on_pre_optimizer_step = on_substep_end

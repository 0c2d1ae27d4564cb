"""Keeps the model with the lowest loss on held-out rows in a folder of its own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from chunkft_fx.tools.models.evaluate import Score
from chunkft_fx.tools.training.folder import save_model

FOLDER = "best"
# Which score the model in the folder has.
NOTE = "score.json"


class Best:
    """The best model of a run; a run that is resumed goes on from what its folder holds."""

    def __init__(self, out: Path, model: Any, tokenizer: Any) -> None:
        self.folder, self.model, self.tokenizer = out / FOLDER, model, tokenizer
        self.loss, self.step = math.inf, 0

    def resume(self, step: int) -> None:
        """Take up the score of the model that is there, if it is whole; else scores count from this step on."""
        self.step = step
        note = self.folder / NOTE
        if note.exists() and (self.folder / "config.json").exists():
            found = json.loads(note.read_text())
            self.loss, self.step = float(found["loss"]), int(found["step"])

    def is_enough(self, step: int, every: int, patience: int) -> bool:
        """Whether the last ``patience`` scores, one in each ``every`` steps, were no better than the best; 0 never is.

        It follows from steps alone, so that a run that was killed ends where it would have ended.
        """
        return bool(patience) and step // every - self.step // every >= patience

    def offer(self, step: int, score: Score) -> bool:
        """Save the model if it is better than all before; says whether it was."""
        if not score.loss < self.loss:
            return False
        self.loss, self.step = score.loss, step
        self.folder.mkdir(exist_ok=True)
        note = json.dumps({"step": step, "loss": score.loss, "accuracy": score.accuracy})
        save_model(self.folder, self.model, self.tokenizer, {NOTE: note})
        return True

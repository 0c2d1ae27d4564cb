"""What the library teaches a byte-level model: all parameters as much as dense AdamW, a chunk a step no less than once.

The share is that of what dense AdamW takes off the held-out loss in the same steps. Floors are a little below what was
measured: what another version of torch or of the text, which is Python's, may make of it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.quality.data import Text
from benchmarks.quality.learn import Learned, Lesson, learn
from benchmarks.quality.rows import METHODS, row
from benchmarks.quality.settings import SETTINGS
from benchmarks.quality.small import NARROW, pretrained, random_model, source_code

STEPS, RATE = 120, 3e-3
# of a row, the rate that it learns most at, and the floor: 0.352 and 0.444 were measured
FLOORS = {"one:chunks=8,interval=1": (1e-3, 0.33), "one:chunks=2,interval=1": (3e-4, 0.42)}


def learned(written: str, lr: float, base: Path, text: Text) -> Learned:
    chosen = row(written)
    model = random_model(NARROW)
    model.load_state_dict(torch.load(base))
    defaults = {"budget": "1GB", "max_grad_norm": 1.0, "seed": 0}
    learner = METHODS[chosen.method].make(model, defaults | dict(chosen.options))
    return learn(learner, text, Lesson(STEPS, SETTINGS["cpu"].batch, lr, 0, torch.device("cpu")))


def test_a_chunk_a_step_is_as_near_to_dense_as_it_was_and_all_parameters_are_dense(tmp_path: Path) -> None:
    base, text = tmp_path / "base.pt", source_code(SETTINGS["cpu"].length, SETTINGS["cpu"].held_out)
    pretrained(SETTINGS["cpu"].length, base, steps=240)
    dense, whole = (learned(name, RATE, base, text) for name in ("dense", "all"))
    assert dense.loss is not None and whole.loss is not None
    assert dense.before - dense.loss > 0.3
    assert abs(whole.loss - dense.loss) < 1e-3
    for name, (lr, floor) in FLOORS.items():
        found = learned(name, lr, base, text)
        assert found.before == pytest.approx(dense.before, rel=1e-5) and found.loss is not None
        share = (found.before - found.loss) / (dense.before - dense.loss)
        assert share > floor, f"{name} took {share:.3f} of what dense AdamW took off the held-out loss"

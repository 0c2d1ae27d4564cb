"""On a GPU, where states are copied to the device and back: what is saved is what was there at the call."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints.test_save import save_and_go_on
from tests.support.checkpointed import WAYS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("way", WAYS)
def test_what_is_saved_beside_training_is_what_was_there_at_the_call(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_and_go_on(tmp_path, way, monkeypatch, "cuda")

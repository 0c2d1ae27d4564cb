"""Late updates beside a CPU, where each is done when the region that reads its weights asks for it."""

from __future__ import annotations

from tests.support.late_updates import LateCases


class TestLateUpdates(LateCases):
    device = "cpu"

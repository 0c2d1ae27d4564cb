"""Has batches split into a number of parts, as if the budget had no room for fewer, or never split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from chunkft_fx.errors import BudgetInfeasible
from chunkft_fx.plan.policy import Policy
from chunkft_fx.planning.batch_plan import BatchPlans

NO_ROOM = "no room for fewer parts"


@contextmanager
def split_into(parts: int) -> Iterator[None]:
    """While inside, no step of fewer than ``parts`` micro-batches fits."""
    prepare = BatchPlans.prepare

    def prepared(self: BatchPlans, batches: Sequence[Sequence[Any]], expected: frozenset[str]) -> Policy:
        if len(batches) < parts:
            raise BudgetInfeasible(NO_ROOM, 2**30, {"batch": 2**30})
        return prepare(self, batches, expected)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(BatchPlans, "prepare", prepared)
        yield


@contextmanager
def unsplit() -> Iterator[None]:
    """While inside, no batch is split."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("chunkft_fx.module.splits.samples", lambda _: 1)
        yield

"""Gradients in host memory: models compiled inside have them wait there whatever their budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from chunkft_fx.copies import engines
from chunkft_fx.copies.link import Link, open_link
from chunkft_fx.copies.states.ring import CopyingRing
from chunkft_fx.copies.tier import HostTier
from chunkft_fx.plan.policy import Policy
from chunkft_fx.planning import planner


def copying_ring(incoming: Link, depth: int, nbytes: int) -> CopyingRing:
    """The ring of a GPU, beside a CPU."""
    return CopyingRing(open_link(incoming.device), open_link(incoming.device), HostTier(incoming.device), depth, nbytes)


@contextmanager
def waiting_in_host(is_copied: bool = False) -> Iterator[None]:
    """Plan for gradients in host memory where the optimizer's step updates; ``is_copied``: as a GPU moves them."""
    decided = planner._base

    def base(*args: Any) -> Policy:
        policy, spec = decided(*args), args[-1]
        waits = bool(policy.pieces) and not policy.in_backward
        return replace(policy, host_gradients=waits, late=waits and spec.is_late)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(planner, "_base", base)
        if is_copied:
            patched.setattr(engines, "make_ring", copying_ring)
        yield

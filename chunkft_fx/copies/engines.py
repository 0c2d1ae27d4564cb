"""Engines: holds what copies for all programs of one model, the weight ring and the saved values.

The ring has a link of its own; saved values share one link for both directions. The third engine, the optimizer's stage
(`copies.states.stage`), has two, and belongs to the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chunkft_fx.copies.link import open_link
from chunkft_fx.copies.residency import Residency
from chunkft_fx.copies.saved_values import SavedValues
from chunkft_fx.copies.tier import Tier
from chunkft_fx.copies.weight_ring import Ring, ring_buffer_nbytes


class Engines:
    """The copy engines of one model between ``device`` and ``tier``; only the ring takes device memory that stays."""

    def __init__(self, device: torch.device, tier: Tier) -> None:
        self.saved = SavedValues(open_link(device), tier)
        self._fetches = open_link(device)
        self._tier = tier
        self._ring: Ring | None = None

    def ring(self, residency: Residency, uses: Sequence[frozenset[str]]) -> Ring | None:
        """The ring for a program whose region calls read these parameters; None where all weights are on the device.

        It is the ring of the program before where that is large enough.
        """
        away = residency.away()
        if not away:
            self._ring = None
            return None
        nbytes = ring_buffer_nbytes([[residency.holder(name) for name in use & away] for use in uses])
        known = self._ring
        if known is None or known.depth != residency.depth or known.buffer_nbytes < nbytes:
            self._ring = None  # free before taking a larger one
            self._ring = Ring(self._fetches, self._tier, residency.depth, nbytes)
        return self._ring

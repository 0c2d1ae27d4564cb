"""Engines: holds what copies for all programs of one model: the weight ring, saved values, and gradients that wait.

All that comes to the device in a step, weights, saved values and the states and gradients of pieces, comes over one
link, in the order in which the program asks for it. On links of their own the copies of states, of which many are
begun early, would hold up a saved value that is needed now: a GPU does them in whatever order it likes. Each of them
leaves over a link of its own. The optimizer's stage (`copies.states.stage`), of steps that cover one chunk, has two
links, and belongs to the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from chunkft_fx.copies.host_memory import require_room
from chunkft_fx.copies.link import open_link
from chunkft_fx.copies.residency import Residency
from chunkft_fx.copies.saved_values import SavedValues
from chunkft_fx.copies.states.ring import PieceRing, make_ring
from chunkft_fx.copies.tier import Tier
from chunkft_fx.copies.waiting_gradients import WaitingGradients
from chunkft_fx.copies.weight_ring import Ring, ring_buffer_nbytes
from chunkft_fx.plan.pieces import Pieces, waiting_nbytes


class Engines:
    """The copy engines of one model between ``device`` and ``tier``; only rings take device memory that stays."""

    def __init__(self, device: torch.device, tier: Tier) -> None:
        self.incoming = open_link(device)
        self.saved = SavedValues(open_link(device), self.incoming, tier)
        self._tier = tier
        self._ring: Ring | None = None
        self._waiting: WaitingGradients | None = None
        self._gradients: PieceRing | None = None

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
            self._ring = Ring(self.incoming, self._tier, residency.depth, nbytes)
        return self._ring

    def waiting(
        self,
        pieces: Pieces,
        parameters: Mapping[str, nn.Parameter],
        others: int,
        ring: PieceRing | None,
        before_writing: Callable[[], None],
    ) -> WaitingGradients:
        """The gradients of these parameters that wait in host memory, in these pieces, moved by ``ring``.

        ``before_writing`` is called before the user's values take the place of what waits. Without a ring one of their
        own moves them. Raises `HostMemoryExceeded` if there is no room for them beside ``others``, bytes that are still
        to be taken.
        """
        known = self._waiting
        if known is None or not known.is_of(pieces):
            self._waiting = self._gradients = None  # free before taking others
            own = (parameters[s.name].nbytes // s.size * s.length for piece in pieces for s in piece.slices)
            require_room(sum(own), others)
            known = self._waiting = WaitingGradients(self._tier, pieces)
        if ring is None:
            ring = self._gradients or make_ring(self.incoming, pieces.depth, waiting_nbytes(pieces, parameters))
            self._gradients = ring
        known.bind(parameters, ring, before_writing)
        return known

"""The ring of states: what a copy waits for, and that every piece comes back changed as it was on the device."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chunkft_fx.copies.link import Link, Mark
from chunkft_fx.copies.states.ring import CopyingRing
from chunkft_fx.copies.tier import HostTier

CPU = torch.device("cpu")


class Noted(Link):
    """A link that notes the marks which its copies come behind."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.behind: list[Mark] = []
        self.given: list[Mark] = []

    def follow_mark(self, mark: Mark) -> None:
        self.behind.append(mark)

    def mark(self, holding: object = ()) -> Mark:
        mark = super().mark()
        self.given.append(mark)
        return mark


def piece(values: list[int]) -> list[Tensor]:
    return [torch.full((n,), float(i)) for i, n in enumerate(values)]


@given(
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=6),
    depth=st.integers(1, 4),
    steps=st.integers(1, 3),
)
def test_every_piece_comes_back_and_waits_for_its_own_way_out(sizes: list[list[int]], depth: int, steps: int) -> None:
    incoming, outgoing = Noted(), Noted()
    ring = CopyingRing(incoming, outgoing, HostTier(CPU), depth, 3 * 256)
    pieces = [piece(values) for values in sizes]
    last_of_piece: dict[int, Mark] = {}
    for _ in range(steps):
        for i, host in enumerate(pieces):
            incoming.behind.clear()
            ring.fetch(i, host)
            if i in last_of_piece:
                assert last_of_piece[i] in incoming.behind
            for t in ring.tensors(i):
                t += 1
            ring.write_back(i)
            last_of_piece[i] = outgoing.given[-1]
    for values, host in zip(sizes, pieces, strict=True):
        for i, t in enumerate(host):
            assert torch.equal(t, torch.full((values[i],), float(i + steps)))


def test_an_abandoned_ring_has_all_its_buffers_again() -> None:
    ring = CopyingRing(Noted(), Noted(), HostTier(CPU), 2, 256)
    ring.fetch(0, piece([3]))
    ring.fetch(1, piece([3]))
    ring.abandon()
    for i in (1, 2):
        ring.fetch(i, piece([3]))
        assert ring.is_fetched(i)

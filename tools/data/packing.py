"""Decides which pieces share a row: as few rows as will do, in an order that follows from the data alone."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

# Pieces that are looked at together: rows hold neighbours of the data set.
BLOCK = 4096


def fill(lengths: Sequence[int], length: int) -> Iterator[list[int]]:
    """Rows of at most ``length`` tokens, each as the indices of its pieces; pieces without tokens are in none.

    Longest first, each goes where it leaves the least room.
    """
    for begin in range(0, len(lengths), BLOCK):
        yield from _fill_block(range(begin, min(begin + BLOCK, len(lengths))), lengths, length)


def _fill_block(block: range, lengths: Sequence[int], length: int) -> Iterator[list[int]]:
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # of rows with room: how much, and which
    for i in sorted(block, key=lambda i: -lengths[i]):
        needed = int(lengths[i])
        if not needed:
            continue
        place = bisect.bisect_left(rooms, (needed, -1))
        if place == len(rooms):
            rows.append([i])
            room, row = length - needed, len(rows) - 1
        else:
            room, row = rooms.pop(place)
            rows[row].append(i)
            room -= needed
        if room:
            bisect.insort(rooms, (room, row))
    for members in rows:
        yield sorted(members)

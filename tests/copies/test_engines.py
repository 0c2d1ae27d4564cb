"""A model's engines: one ring that grows with what programs ask for, and links of their own."""

from __future__ import annotations

import torch
from torch import nn

from chunkft_fx.copies.engines import Engines
from chunkft_fx.copies.residency import Residency
from chunkft_fx.copies.tier import HostTier
from tests.support.stream_machine import CPU

TIER = HostTier(CPU)
MODEL = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 128))
SMALL, LARGE = frozenset({"0.weight"}), frozenset({"1.weight"})


def streaming(depth: int) -> Residency:
    residency = Residency(MODEL, CPU, TIER)
    residency.settle(dict(MODEL.named_parameters()), depth)
    return residency


def test_programs_share_a_ring_that_is_large_enough() -> None:
    engines, residency = Engines(CPU, TIER), streaming(2)
    ring = engines.ring(residency, [SMALL, LARGE])
    assert ring is not None
    assert (ring.depth, ring.buffer_nbytes) == (2, 64 * 128 * 4)
    assert engines.ring(residency, [SMALL]) is ring
    assert engines.ring(residency, []) is ring


def test_a_larger_use_or_another_depth_takes_another_ring_on_the_same_link() -> None:
    engines = Engines(CPU, TIER)
    small = engines.ring(streaming(2), [SMALL])
    large = engines.ring(streaming(2), [LARGE])
    deep = engines.ring(streaming(3), [LARGE])
    assert small is not None and large is not None and deep is not None
    assert [r.depth * r.buffer_nbytes for r in (small, large, deep)] == [2 * 16384, 2 * 32768, 3 * 32768]
    assert small.link is large.link is deep.link


def test_there_is_no_ring_where_all_weights_are_on_the_device() -> None:
    engines, residency = Engines(CPU, TIER), streaming(2)
    assert engines.ring(residency, [SMALL]) is not None
    residency.settle((), 2)
    assert engines.ring(residency, [SMALL]) is None
    assert engines._ring is None


def test_all_that_comes_to_the_device_has_one_link_and_what_leaves_another() -> None:
    engines = Engines(CPU, TIER)
    ring = engines.ring(streaming(2), [SMALL])
    assert ring is not None
    assert ring.link is engines.incoming is engines.saved._in
    assert engines.saved._out is not engines.incoming
    copies = ring.fetch([torch.ones(64)], 0)
    kept = engines.saved.offload(copies, 0)
    assert bool(kept[0].tensor.eq(1).all())

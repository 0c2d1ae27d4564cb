"""What a rank keeps and moves is its share, and what passes between ranks takes memory and time."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from chunkft_fx.errors import OptionError
from chunkft_fx.machine.rates import ALONE, RankLink
from chunkft_fx.plan.chunk import Chunk, Share, Slice
from chunkft_fx.plan.pieces import Pieces, moving_nbytes
from chunkft_fx.plan.policy import Policy
from chunkft_fx.plan.state_spec import ASSUMED
from chunkft_fx.predict.fixed_memory import BETWEEN_RANKS, RING_OF_STATES, host_terms, piece_terms, rank_terms
from chunkft_fx.tools.rates import parse_link

ROWS, WIDTH = 600, 100
PARAMETERS: dict[str, Tensor] = {
    name: torch.empty(ROWS, WIDTH, dtype=torch.bfloat16, device="meta") for name in ("first", "second")
}
NBYTES = ROWS * WIDTH * (2 + 12)
CHUNK = Chunk(tuple(Slice(name, 0, 0, ROWS, ROWS) for name in PARAMETERS), 2 * ROWS * WIDTH, 2 * NBYTES)
PIECES = Pieces(tuple(Chunk((s,), ROWS * WIDTH, NBYTES) for s in CHUNK.slices))
POLICY = Policy(pieces=PIECES, host_gradients=True)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_shares_cover_every_index_once_and_are_equal(ranks: int) -> None:
    for size in (1, 2, ranks, 600, 601):
        runs = [share.of(size) for share in Share(0, ranks).each]
        assert sum(length for _, length in runs) == size
        assert all(start + length == after for (start, length), (after, _) in pairwise(runs))
        assert max(length for _, length in runs) - min(length for _, length in runs) <= 1
    part = Slice("first", 0, 100, 300, ROWS)
    inside = [own for share in Share(0, ranks).each if (own := share.within(part)) is not None]
    assert sum(own.length for own in inside) == part.length
    assert inside[0].start == part.start


def test_a_rank_keeps_and_moves_its_share_of_the_states() -> None:
    one, three = (replace(POLICY, ranks=ranks) for ranks in (1, 3))
    rings = [piece_terms(PARAMETERS, CHUNK, policy)[RING_OF_STATES] for policy in (one, three)]
    assert rings[0] == pytest.approx(3 * rings[1], rel=0.01)
    kept = [host_terms(PARAMETERS, [CHUNK], policy)["optimizer states"] for policy in (one, three)]
    assert kept[1] == kept[0] // 3
    assert moving_nbytes(PIECES[0], PARAMETERS, frozenset(), 3) == ROWS * WIDTH * 12 // 3
    whole = replace(ASSUMED, is_whole=True)
    assert host_terms(PARAMETERS, [CHUNK], three, whole)["optimizer states"] == kept[0]


def test_what_passes_between_ranks_has_room() -> None:
    weights = ROWS * WIDTH * 2
    assert rank_terms(PARAMETERS, [CHUNK], POLICY) == {}
    two = replace(POLICY, ranks=2)
    assert rank_terms(PARAMETERS, [CHUNK], two) == {BETWEEN_RANKS: 2 * weights + weights // 2}
    assert rank_terms(PARAMETERS, [CHUNK], Policy(ranks=2)) == {BETWEEN_RANKS: 3 * weights}


def test_the_time_of_a_link_counts_the_mean_and_the_new_weights() -> None:
    assert ALONE.us_per_byte == 0
    assert RankLink(2, 100e9).us_per_byte == pytest.approx(2 / 100e3)
    assert RankLink(4, 100e9).us_per_byte == pytest.approx(2.5 / 100e3)


def test_links_of_the_command_line() -> None:
    assert parse_link(1, "nvlink") is ALONE
    assert parse_link(8, "pcie").ranks == 8
    assert parse_link(2, "240G").nbytes_per_s == 240e9
    for ranks, text in ((0, "nvlink"), (2, "string"), (2, "-5G")):
        with pytest.raises(OptionError, match=r"--ranks 0|--link"):
            parse_link(ranks, text)

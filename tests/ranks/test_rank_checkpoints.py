"""A training that goes on with other numbers of ranks is the one that was not interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import chunkft_fx
from tests.support.rank_runs import Case, losses_of, made, model_of, trained
from tests.support.worlds import World

CASES = {
    "one": Case({"coverage": "one", "chunks": 3}),
    "all": Case({"coverage": "all"}),
    "8 bits": Case({"coverage": "one", "chunks": 3}, {"state_dtype": "8bit"}),
    "whole parameters": Case({"coverage": "one", "chunks": 3}, kind="Adafactor"),
}
STEPS = 9


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[int, World]]:
    with closing(World(2)) as two, closing(World(3)) as three:
        yield {2: two, 3: three}


def gone_on(case: Case, folder: str, first: int, last: int, rank: int = 0, size: int = 1) -> tuple[list[float], Any]:
    """Losses and weights from step ``first`` up to ``last``, behind a checkpoint, and with one at the end."""
    compiled, optimizer = made(case, seed=rank)
    if first:
        assert chunkft_fx.load(folder, compiled, optimizer).step == first
    losses = losses_of(case, compiled, optimizer, range(first, last), rank, size)
    chunkft_fx.save(folder, compiled, optimizer, last, wait=False)
    return losses, {name: p.detach().clone() for name, p in compiled.named_parameters()}


def on_rank(case: Case, folder: str, first: int, last: int) -> tuple[list[float], Any]:
    """`gone_on`, as one of several ranks."""
    return gone_on(case, folder, first, last, dist.get_rank(), dist.get_world_size())


@pytest.mark.parametrize("name", CASES)
def test_ranks_can_be_3_then_1_then_2(worlds: dict[int, World], tmp_path: Path, name: str) -> None:
    case, folder = CASES[name], str(tmp_path)
    losses, weights = trained(Case(**vars(case) | {"steps": STEPS}))
    found = worlds[3].run(on_rank, case, folder, 0, 4)[2][0]
    found += gone_on(case, folder, 4, 6)[0]
    last, ours = worlds[2].run(on_rank, case, folder, 6, STEPS)[1]
    assert found + last == pytest.approx(losses, rel=1e-9)
    assert max(float((ours[key] - weight).abs().max()) for key, weight in weights.items()) <= 1e-9
    chunkft_fx.wait_for_saves()


def in_bfloat16(folder: str, first: int, last: int) -> dict[str, Tensor]:
    """Weights with remainders for masters, behind a checkpoint if ``first`` is not 0."""
    model = model_of(dist.get_rank()).bfloat16()
    compiled = chunkft_fx.compile(model, "1GB", coverage="one", chunks=3, interval=1, backend="eager")
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2, master="remainder")
    if first:
        chunkft_fx.load(folder, compiled, optimizer)
    for step in range(first, last):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        ids = torch.randint(0, 12, (2, 5), generator=generator)
        compiled(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 3:
            chunkft_fx.save(folder, compiled, optimizer, 4)
    return {name: p.detach().clone() for name, p in compiled.named_parameters()}


def test_shares_of_remainders_are_saved_to_the_bit(worlds: dict[int, World], tmp_path: Path) -> None:
    whole = worlds[3].run(in_bfloat16, str(tmp_path), 0, 7)
    for before, after in zip(whole, worlds[3].run(in_bfloat16, str(tmp_path), 4, 7), strict=True):
        assert all(torch.equal(before[name], weight) for name, weight in after.items())


def test_a_state_dict_of_a_share_is_refused(worlds: dict[int, World]) -> None:
    for message in worlds[2].run(state_dict_refused):
        assert "chunkft_fx.save" in message


def state_dict_refused() -> str:
    """What ``state_dict`` of one of several ranks raises."""
    _, optimizer = made(Case({"coverage": "one", "chunks": 3}))
    with pytest.raises(chunkft_fx.errors.DistributedNotSupported) as raised:
        optimizer.state_dict()
    return str(raised.value)

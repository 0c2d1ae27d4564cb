"""State streaming without a GPU: the CUDA stage with streams that work as late as they may."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from chunkft_fx.copies.link import CudaLink, Link
from chunkft_fx.copies.states import batches as stage_batches
from chunkft_fx.copies.states import stage as state_stage
from chunkft_fx.copies.states.batches import Batch, last_conflict
from chunkft_fx.copies.states.stage import CopiedStage, Stage
from chunkft_fx.copies.tier import HostTier
from chunkft_fx.optim.rules.adamw import AdamW
from tests.support.block_net import block_compiled, block_net, feed_sweep
from tests.support.small_net import compiled, feed, net, train_step
from tests.support.stream_machine import CPU, Machine, copied_stage, machine

__all__ = ["machine"]


def test_the_stage_copies_in_and_back(machine: Machine) -> None:
    host = [torch.arange(6.0).reshape(2, 3), torch.ones(5, dtype=torch.float64), torch.full((1,), 7.0)]
    stage = copied_stage(0)
    stage.announce(host)
    staged = stage.tensors()
    for h, s in zip(host, staged, strict=True):
        assert torch.equal(h, s)
        assert h.dtype == s.dtype
        assert s.data_ptr() % 8 == 0
        s.add_(1)
    assert host[0][0, 0] == 0
    stage.write_back()
    stage.synchronize()
    assert host[0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert host[1].tolist() == [2] * 5
    assert host[2].tolist() == [8]


def test_copies_begin_after_the_work_that_was_queued_before(machine: Machine) -> None:
    compute = torch.cuda.current_stream(CPU)
    stage: Any = copied_stage(0)
    incoming, outgoing = stage._incoming._stream, stage._outgoing._stream
    for turn in range(3):
        stage.announce([torch.ones(100)])
        stage.admit(1.0)
        assert incoming.waits[-1] == (compute, turn)
        stage.tensors()
        stage.write_back()
        assert outgoing.waits[-1] == (compute, turn)


def random_parts(memory: Tensor, cuts: list[int], rng: random.Random) -> list[Tensor]:
    """Some of the parts into which ``cuts`` divide host memory, in any order."""
    parts = [memory[a:b] for a, b in zip([0, *cuts], [*cuts, memory.numel()], strict=True) if b > a]
    return rng.sample(parts, rng.randint(0, len(parts)))


def exchange(seed: int, machine: Machine | None) -> Tensor:
    """Host memory after random fetches, updates and write-backs: on the CUDA stage, or in place without one."""
    rng = random.Random(seed)
    memory = torch.arange(6000.0, dtype=torch.float64)
    # two ways to cut, so that what is fetched overlaps what is being written in part
    ways = [sorted(rng.sample(range(1, 6000), 12)), list(range(500, 6000, 500))]
    stage = Stage(CPU) if machine is None else copied_stage(0 if seed % 2 else 8 * 6000 + 13 * 256)
    if machine is not None:
        machine.chance = random.Random(seed) if seed % 3 else None
    for step in range(25):
        stage.announce(random_parts(memory, rng.choice(ways), rng))
        for share in sorted(rng.random() for _ in range(rng.randint(0, 4))):
            stage.admit(share)
        if rng.random() < 0.2:
            continue  # another chunk is activated before the update
        for _ in range(rng.randint(0, 2)):
            for i, t in enumerate(sorted(stage.tensors(), key=lambda t: t.numel())):
                t.mul_(0.5).add_(step + i % 2)
            if rng.random() < 0.5:
                stage.write_back()  # updated again before anything else is fetched
                stage.synchronize()
        stage.tensors()
        stage.write_back()
    stage.synchronize()
    return memory


@pytest.mark.parametrize("seed", range(30))
def test_no_order_of_the_copies_changes_a_value(machine: Machine, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(stage_batches, "BATCH_NBYTES", 4096)
    assert torch.equal(exchange(seed, machine), exchange(seed, None))


def no_conflict_on_the_stage(written: Any, batch: Any) -> int:
    moved = [Batch(w.start + 2**30, w.end + 2**30, w.copies) for w in written]
    return last_conflict(moved, batch)


def no_conflict_in_host_memory(written: Any, batch: Any) -> int:
    return last_conflict(written, Batch(batch.start, batch.end, ()))


@pytest.mark.parametrize("broken", [lambda written, batch: -1, no_conflict_on_the_stage, no_conflict_in_host_memory])
def test_a_fetch_that_does_not_wait_is_noticed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, broken: Callable[[Any, Any], int]
) -> None:
    monkeypatch.setattr(stage_batches, "BATCH_NBYTES", 4096)
    monkeypatch.setattr(state_stage, "last_conflict", broken)
    assert any(not torch.equal(exchange(seed, machine), exchange(seed, None)) for seed in range(30))


def test_the_next_chunk_comes_in_while_the_last_one_goes_out(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_batches, "BATCH_NBYTES", 4096)
    memory = torch.zeros(2, 10 * 1024)
    stage = copied_stage(0)
    stage.announce([memory[0]])
    stage.tensors()[0].fill_(1)
    stage.write_back()
    stage.announce([memory[1]])
    stage.admit(1.0)
    copies = [w for w in machine.work if w.action is not None]
    assert len(copies) == 10 + 10
    for i in range(10):  # the i-th batch in needs i batches out, no more
        machine.finish(copies[10 + i])
        assert int(memory[0].count_nonzero()) == (i + 1) * 1024


def test_what_was_announced_comes_in_as_it_is_admitted(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_batches, "BATCH_NBYTES", 4096)
    stage: Any = copied_stage(0)
    fetches: Any = CudaLink(CPU)
    incoming = stage._incoming._stream
    stage.announce([torch.arange(10 * 1024.0)])
    begun = []
    for share in (0.0, 0.3, 0.25, 0.99, 1.0):
        stage.admit(share, [fetches])
        begun.append(len([w for w in machine.work if w.action is not None]))
    assert begun == [0, 3, 3, 9, 10]
    assert [stream for stream, _ in incoming.waits] == [torch.cuda.current_stream(CPU), fetches._stream] * 3
    stage.announce([torch.arange(10 * 1024.0)])
    assert torch.equal(stage.tensors()[0], torch.arange(10 * 1024.0))


def test_neighbours_in_host_memory_move_in_one_copy(machine: Machine) -> None:
    memory = torch.arange(300 * 64.0)
    neighbours, apart = list(memory.split(64)), [torch.ones(64) for _ in range(3)]
    stage = copied_stage(0)
    stage.announce([*reversed(neighbours), *apart])
    stage.admit(1.0)
    assert len([w for w in machine.work if w.action is not None]) == 1 + 3
    assert all(torch.equal(s, h) for s, h in zip(stage.tensors(), [*reversed(neighbours), *apart], strict=True))


def test_the_stage_takes_memory_once_for_the_largest_chunk(machine: Machine) -> None:
    stage = copied_stage(1024)
    stage.announce([torch.ones(8)])
    first = stage.tensors()[0].data_ptr()
    both = torch.ones(160)
    stage.announce([both[:60], both[60:]])
    assert stage.tensors()[0].data_ptr() == first
    assert stage.tensors()[1].data_ptr() == first + 256
    stage.announce([torch.arange(400.0)])  # more than was promised: the stage grows
    assert torch.equal(stage.tensors()[0], torch.arange(400.0))


class Interrupted(HostTier):
    """A tier at which the user interrupts the copies of the ``last`` batch halfway."""

    def __init__(self, last: int) -> None:
        super().__init__(CPU)
        self.left = last

    def copy_in(self, link: Link, kept: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        super().copy_in(link, kept, targets)


@pytest.mark.parametrize("last", [1, 4, 10])
def test_states_whose_copies_were_interrupted_come_in_all_the_same(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    monkeypatch.setattr(stage_batches, "BATCH_NBYTES", 4096)
    stage = CopiedStage(CudaLink(CPU), CudaLink(CPU), Interrupted(last), 0)
    host = torch.arange(1, 10 * 1024 + 1.0)
    stage.announce([host])
    with pytest.raises(KeyboardInterrupt):
        stage.admit(1.0)
    stage.abandon()
    assert torch.equal(stage.tensors()[0], host)


def test_an_abandoned_step_leaves_updated_states_and_what_was_announced(machine: Machine) -> None:
    stage = copied_stage(0)
    first, second = torch.ones(100), torch.full((100,), 5.0)
    stage.announce([first])
    stage.tensors()[0].add_(1)  # newer than host memory until it is written back
    stage.abandon()
    assert bool(stage.tensors()[0].eq(2).all())
    stage.write_back()
    stage.announce([second])
    stage.admit(0.5)
    stage.abandon()
    assert bool(first.eq(2).all())
    assert bool(stage.tensors()[0].eq(5).all())


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "interval"),
    [(torch.float32, "float32", 1), (torch.float32, "bfloat16", 3), (torch.bfloat16, "bfloat16", 1)]
    + [(torch.bfloat16, "float32", 3)],
)
def test_training_through_the_stage_equals_training_in_place(
    machine: Machine, dtype: torch.dtype, state_dtype: str, interval: int
) -> None:
    machine.chance = random.Random(interval)
    inplace, staged = compiled(net(dtype), 5, "random", interval), compiled(net(dtype), 5, "random", interval)
    a, b = (AdamW(m, max_grad_norm=0.1, state_dtype=state_dtype) for m in (inplace, staged))
    assert type(a._states.stage) is Stage
    b._states.stage = copied_stage(b._states.capacity())
    for step in range(17):
        train_step(inplace, a, step, dtype)
        train_step(staged, b, step, dtype)
        if step in (4, 9):  # in the midst of an interval: host memory must be brought up to date
            same_state(a.state_dict(), b.state_dict())
        if step == 11:  # a chunk whose states were not fetched ahead
            for module in (inplace, staged):
                module.activate((module.chunk + 2) % 5)
    same_state(a.state_dict(), b.state_dict())
    for p, q in zip(inplace.parameters(), staged.parameters(), strict=True):
        assert torch.equal(p, q)


def test_training_in_8_bits_through_the_stage_equals_training_in_place(machine: Machine) -> None:
    machine.chance = random.Random(0)
    inplace, staged = (block_compiled(block_net(torch.bfloat16), chunks=5, order="random") for _ in range(2))
    a, b = (AdamW(m, state_dtype="8bit", master="remainder") for m in (inplace, staged))
    b._states.stage = copied_stage(b._states.capacity())
    for step in range(12):
        for module, optimizer in ((inplace, a), (staged, b)):
            feed_sweep(module, step)
            optimizer.step()
        if step == 6:
            same_state(a.state_dict(), b.state_dict())
    same_state(a.state_dict(), b.state_dict())
    assert any(not s.is_whole for chunk in staged.plan.chunks for s in chunk.slices)


def same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["state"].keys() == b["state"].keys()
    for i, state in a["state"].items():
        for key, value in state.items():
            other = b["state"][i][key]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other


def test_the_capacity_is_what_the_largest_chunk_takes(machine: Machine) -> None:
    module = compiled(net(), 5)
    optimizer = AdamW(module)
    optimizer._states.stage = stage = copied_stage(optimizer._states.capacity())
    feed(module, 0)
    optimizer.step()
    first = stage._arena
    for step in range(1, 10):
        feed(module, step)
        optimizer.step()
    assert stage._arena is first

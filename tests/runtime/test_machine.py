"""What instructions run on: a step that fails abandons every engine, and states come in behind weights under way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from chunkft_fx.copies.link import CudaLink, Link
from chunkft_fx.copies.saved_values import SavedValues
from chunkft_fx.copies.tier import HostTier
from chunkft_fx.copies.weight_ring import Ring
from chunkft_fx.graph import ops
from chunkft_fx.program.instructions import Instruction, Slots, StreamNode
from chunkft_fx.runtime.step import Machine, execute
from tests.support.stream_machine import CPU, copied_stage, machine
from tests.support.stream_machine import Machine as Streams

__all__ = ["machine"]


def on_streams() -> Machine:
    """A machine with every engine, its stage with states that were updated once."""
    stage = copied_stage(0)
    stage.announce([torch.ones(64)])
    stage.tensors()
    ring = Ring(CudaLink(CPU), HostTier(CPU), 2, 1024)
    return Machine("eager", None, ring, SavedValues(CudaLink(CPU), CudaLink(CPU), HostTier(CPU)), stage)


def fetch_a_weight(m: Machine) -> None:
    assert m.ring is not None
    m.ring.fetch([torch.ones(64)], 0)


def offload_a_value(m: Machine) -> None:
    assert m.saved is not None
    m.saved.offload([torch.ones(64)], 0)


def admit_states(m: Machine) -> None:
    assert m.stage is not None
    m.stage.announce([torch.ones(64)])
    m.stage.admit(1.0)


def write_states_back(m: Machine) -> None:
    assert m.stage is not None
    m.stage.write_back()


BEGUN = [fetch_a_weight, offload_a_value, admit_states, write_states_back]


@pytest.mark.parametrize("begin", BEGUN)
def test_abandoning_ends_the_copies_of_every_engine(machine: Streams, begin: Callable[[Machine], None]) -> None:
    running = on_streams()
    begin(running)
    assert any(w.action is not None for w in machine.work)
    running.abandon()
    assert not any(w.action is not None for w in machine.work)


@pytest.mark.parametrize("begin", BEGUN)
def test_instructions_that_fail_end_all_copies_before_their_values_are_dropped(
    machine: Streams, begin: Callable[[Machine], None]
) -> None:
    running = on_streams()
    value = torch.zeros(4)
    slots: Slots = {0: value}
    seen: list[bool] = []

    class Failing(Machine):
        def run(self, instruction: Instruction, arguments: list[Any]) -> Sequence[Any]:
            begin(self)
            raise KeyboardInterrupt

        def abandon(self) -> None:
            seen.append(slots.get(0) is value)
            super().abandon()

    failing = Failing("eager", None, running.ring, running.saved, running.stage)
    instruction = Instruction(StreamNode(ops.release, 0, False), (0,), (), ())
    with pytest.raises(KeyboardInterrupt):
        execute([instruction], slots, failing, lambda *_: None)
    assert seen == [True]
    assert not any(w.action is not None for w in machine.work)


def test_a_machine_without_engines_has_nothing_to_abandon() -> None:
    Machine("eager", None).abandon()


def test_states_are_admitted_behind_the_weights_under_way(machine: Streams) -> None:
    running: Any = on_streams()
    fetch_a_weight(running)
    running.stage.announce([torch.ones(64)])
    running.run(Instruction(StreamNode(ops.admit, 0, False, share=1.0), (), (), ()), [])
    followed = [stream for stream, _ in running.stage._incoming._stream.waits]
    assert followed[-2:] == [torch.cuda.current_stream(CPU), running.ring.link._stream]


def test_a_machine_without_a_stage_admits_nothing() -> None:
    running = Machine("eager", None, Ring(Link(CPU), HostTier(CPU), 2, 1024))
    assert running.run(Instruction(StreamNode(ops.admit, 0, False, share=1.0), (), (), ()), []) == ()

"""Programs say when optimizer states come in: the same training, with copies that begin where the program has them."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import chunkft_fx
from chunkft_fx.copies.link import CudaLink, Link
from chunkft_fx.copies.states import batches as stage_batches
from chunkft_fx.copies.states.stage import CopiedStage, Stage
from chunkft_fx.copies.tier import HostTier
from chunkft_fx.graph import ops
from chunkft_fx.machine.rates import Rates
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.plan.state_spec import ASSUMED
from chunkft_fx.predict.predictor import Predictor
from chunkft_fx.program.programs import Programs
from chunkft_fx.runtime import step as runtime
from chunkft_fx.tools.zoo import Batch, tiny
from tests.support.equivalence import smallest_budget
from tests.support.stream_machine import CPU, Machine, machine

__all__ = ["machine"]

# A link so slow that states take a good part of the step.
RATES = Rates({"float32": 1e10}, 1e10, 1e9, 1e9, 1e9, 3.0)
CHUNKS = 3


class Recorded(CopiedStage):
    """A stage that remembers each share that was admitted, and how many batches that let begin."""

    def __init__(self, capacity: int) -> None:
        super().__init__(CudaLink(CPU), CudaLink(CPU), HostTier(CPU), capacity)
        self.begun: list[tuple[float, int]] = []

    def admit(self, share: float, after: Sequence[Link] = ()) -> None:
        before = self._admitted
        super().admit(share, after)
        self.begun.append((share, self._admitted - before))


@pytest.fixture(autouse=True)
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are predicted as they are on a GPU, so that programs pace states."""

    def predictor(programs: Programs, absent: frozenset[str], **of_a_batch: Any) -> Predictor:
        return Predictor(programs, absent, **(of_a_batch | {"known": RATES}))

    monkeypatch.setattr("chunkft_fx.planning.batch_plan.Predictor", predictor)


@pytest.fixture(params=[0.0, pytest.param(0.2, marks=pytest.mark.slow)])
def llama(request: pytest.FixtureRequest) -> tuple[nn.Module, Batch]:
    """With this much dropout. Asked for before ``machine``: transformers is imported with torch's own streams there."""
    return tiny("llama", dropout=request.param)


def train(compiled: CompiledModule, optimizer: chunkft_fx.AdamW, batches: list[dict[str, torch.Tensor]]) -> None:
    torch.manual_seed(0)
    for batch in batches:
        compiled(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_training_with_paced_states_equals_training_in_place(
    llama: tuple[nn.Module, Batch], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_batches, "BATCH_NBYTES", 4096)
    machine.chance = random.Random(0)
    model, batch = llama
    model.train()
    batches = [batch(2, 12, seed) for seed in range(3 * CHUNKS)]
    budget = smallest_budget(model, batches[0], CHUNKS)
    plain, paced = (
        chunkft_fx.compile(copy.deepcopy(model), budget, chunks=CHUNKS, interval=1, backend="eager") for _ in range(2)
    )
    in_place, optimizer = chunkft_fx.AdamW(plain, lr=1e-2), chunkft_fx.AdamW(paced, lr=1e-2)
    paced(**batches[0])
    optimizer._states.stage = stage = Recorded(optimizer._states.capacity())
    train(plain, in_place, batches)
    train(paced, optimizer, batches)
    for (name, p), q in zip(plain.named_parameters(), paced.parameters(), strict=True):
        assert torch.equal(p, q), name
    admits = paced.program.graph.find_nodes(op="call_function", target=ops.admit)
    assert len(admits) > 2
    # all but the first chunk's states, which were fetched by their own update, began while programs ran
    within = sum(count for share, count in stage.begun if share < 1.0)
    assert within > sum(count for _, count in stage.begun) / 2


class Interrupted(Recorded):
    """A stage at whose copies the user interrupts the program once, at its call number ``left``."""

    left = 7

    def admit(self, share: float, after: Sequence[Link] = ()) -> None:
        if share < 1.0 and self.left > 0:
            self.left -= 1
            if self.left == 0:
                super().admit(share, after)  # some of them are under way
                raise KeyboardInterrupt
        super().admit(share, after)


def test_steps_that_are_interrupted_while_states_come_in_can_be_made_again(
    llama: tuple[nn.Module, Batch], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_batches, "BATCH_NBYTES", 4096)
    machine.chance = random.Random(1)
    model, batch = llama
    batches = [batch(2, 12, seed) for seed in range(2 * CHUNKS)]
    budget = smallest_budget(model.train(), batches[0], CHUNKS)
    plain, paced = (
        chunkft_fx.compile(copy.deepcopy(model), budget, chunks=CHUNKS, interval=1, backend="eager") for _ in range(2)
    )
    in_place, optimizer = chunkft_fx.AdamW(plain, lr=1e-2), chunkft_fx.AdamW(paced, lr=1e-2)
    paced(**batches[0])
    optimizer._states.stage = stage = Interrupted(optimizer._states.capacity())
    interrupted = 0
    for seed, given in enumerate(batches):
        for module, its in ((plain, in_place), (paced, optimizer)):
            torch.manual_seed(seed)
            try:
                module(**given).loss.backward()
            except KeyboardInterrupt:
                interrupted += 1
                torch.manual_seed(seed)
                module(**given).loss.backward()
            its.step()
            its.zero_grad()
    assert (interrupted, stage.left) == (1, 0)
    for (name, p), q in zip(plain.named_parameters(), paced.parameters(), strict=True):
        assert torch.equal(p, q), name
    a, b = in_place.state_dict()["state"], optimizer.state_dict()["state"]
    for i, state in a.items():
        assert all(torch.equal(v, b[i][k]) for k, v in state.items() if isinstance(v, torch.Tensor)), i


def test_an_optimizer_that_is_gone_is_not_missed() -> None:
    model, batch = tiny("llama")
    compiled = chunkft_fx.compile(model.train(), "1GB", chunks=CHUNKS, interval=1, backend="eager")
    optimizer = chunkft_fx.AdamW(compiled)
    compiled(**batch(2, 12, 0))
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    compiled(**batch(2, 12, 0)).loss.backward()
    assert compiled.program.graph.find_nodes(op="call_function", target=ops.admit)


class Asked:
    """An optimizer that notes when it is asked to take its memory."""

    has_begun = False

    def __init__(self) -> None:
        self.stage = Stage(CPU)
        self.spec = ASSUMED
        self.state: dict[Any, Any] = {}
        self.param_groups: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.updates = None
        self.untaken_nbytes = 0

    def begin_backward(self) -> None:
        raise AssertionError("no backward updates weights")

    def end_backward(self) -> None:
        raise AssertionError("no backward updates weights")

    def take_stage(self) -> None:
        self.notes.append("stage")

    def follow(self, parameters: Mapping[str, nn.Parameter]) -> None:
        raise AssertionError("the model did not change")

    def refuse_partial_step(self) -> None:
        raise NotImplementedError

    def drop_stage(self) -> None:
        self.notes.append("dropped")


def test_the_stage_is_taken_between_plan_and_first_step(
    llama: tuple[nn.Module, Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = llama
    compiled = chunkft_fx.compile(model.train(), "1GB", backend="eager")
    owner = Asked()
    run = runtime.Machine.run

    def noted(*args: Any) -> Any:
        owner.notes.append(f"{len(compiled.plan.chunks)} chunks")
        return run(*args)

    monkeypatch.setattr(runtime.Machine, "run", noted)
    compiled._training.expect(owner)
    compiled(**batch(2, 12, 0))
    compiled(**batch(2, 12, 1))
    assert owner.notes.index("stage") == 0
    assert owner.notes.count("stage") == 1
    assert len(owner.notes) > 1

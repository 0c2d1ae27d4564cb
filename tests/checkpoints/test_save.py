"""A training that is saved and loaded goes on to the very bits, also one saved beside the steps that follow."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import chunkft_fx
from chunkft_fx.checkpoints import saving
from chunkft_fx.checkpoints.saving import Saving
from chunkft_fx.checkpoints.states import Block
from tests.support.checkpointed import WAYS, Made, assert_equal, made

QUICK = ("chunks in bfloat16", "backward")
ways = pytest.mark.parametrize("way", [pytest.param(w, marks=() if w in QUICK else pytest.mark.slow) for w in WAYS])


class Gate:
    """Holds up a writer before each block, until it is let go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes = threading.Semaphore(0)
        begin = Saving._next

        def held(writer: Saving) -> Block | None:
            self.passes.acquire()
            return begin(writer)

        monkeypatch.setattr(Saving, "_next", held)

    def open(self) -> None:
        self.passes.release(10**6)


def loaded(training: Made, folder: Path) -> chunkft_fx.Loaded:
    return chunkft_fx.load(folder, training.model, training.optimizer, scheduler=training.scheduler)


@ways
def test_what_is_saved_is_what_was_there_at_the_call_and_goes_on_to_the_same_bits(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_and_go_on(tmp_path, way, monkeypatch)


def save_and_go_on(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch, device: str = "cpu") -> None:
    """Saved before the next step, and beside steps, in which the writer stands still behind its third block."""
    training = made(way, device=device)
    training.steps(0, 4)
    extra = {"epoch": (1, 2)}
    now, beside = tmp_path / "now", tmp_path / "beside"
    path = chunkft_fx.save(now, training.model, training.optimizer, 4, scheduler=training.scheduler, extra=extra)
    assert path == now / "checkpoint-4"
    at_save, random = training.values(), torch.get_rng_state()
    gate = Gate(monkeypatch)
    gate.passes.release(3)
    chunkft_fx.save(beside, training.model, training.optimizer, 4, scheduler=training.scheduler, wait=False)
    training.steps(4, 8)
    assert not (beside / "checkpoint-4").exists()
    gate.open()
    chunkft_fx.wait_for_saves()
    after = training.values()
    again = made(way, device=device)
    for folder, given in ((now, extra), (beside, None)):
        assert loaded(again, folder) == chunkft_fx.Loaded(folder / "checkpoint-4", 4, given)
        assert torch.equal(torch.get_rng_state(), random)
        assert_equal(again.values(), at_save)
    again.steps(4, 8)
    assert_equal(again.values(), after)


@pytest.mark.parametrize("way", ["chunks", pytest.param("all", marks=pytest.mark.slow)])
def test_a_step_waits_for_what_may_not_be_copied(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    training = made(way)
    training.steps(0, 4)
    at_save = training.values()
    gate = Gate(monkeypatch)
    chunkft_fx.save(tmp_path, training.model, training.optimizer, 4, scheduler=training.scheduler, wait=False)
    monkeypatch.setattr(saving, "available_nbytes", lambda: 0)
    stepping = threading.Thread(target=training.steps, args=(4, 6))
    stepping.start()
    stepping.join(0.3)
    assert stepping.is_alive()
    gate.open()
    stepping.join()
    chunkft_fx.wait_for_saves()
    loaded(training, tmp_path)
    assert_equal(training.values(), at_save)


@pytest.mark.slow
def test_states_of_a_whole_matrix_are_saved_beside_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adafactor's belong to parameters, not to slices of them."""
    training = made("chunks", adafactor=True)
    training.steps(0, 4)
    at_save = training.values()
    gate = Gate(monkeypatch)
    chunkft_fx.save(tmp_path, training.model, training.optimizer, 4, scheduler=training.scheduler, wait=False)
    training.steps(4, 7)
    gate.open()
    chunkft_fx.wait_for_saves()
    loaded(training, tmp_path)
    assert_equal(training.values(), at_save)

"""The predicted timeline of a step against a tracker of all storages that real steps make."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import chunkft_fx
from chunkft_fx.graph import ops
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.plan.policy import DEPTH, Policy
from chunkft_fx.predict import fixed_memory
from chunkft_fx.predict.region import memory as memory_model
from chunkft_fx.predict.step_memory import Moment, step_timeline, storages_nbytes
from chunkft_fx.runtime.session import Session
from chunkft_fx.tools.zoo import FAMILIES, tiny
from tests.support.equivalence import loss_of
from tests.support.forced_policy import force
from tests.support.live_storages import LiveStorages

# Families that differ in what matters here: tied weights, dropout, mutated buffers, no blocks.
QUICK = [(family, 3) for family in ("gpt2", "bert", "cnn", "mlp")]
ALL = [(family, chunks) for family in FAMILIES for chunks in (1, 3, 7)]
CASES = [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in ALL]


@contextmanager
def tracked() -> Iterator[LiveStorages]:
    """Track what sessions do forward; backward, which ends with the gradients in their parameters, is the caller's."""
    tracker = LiveStorages()
    call = Session.__call__

    def tracked_call(self: Session, *arguments: Any) -> tuple[Any, ...]:
        with tracker:
            return call(self, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Session, "__call__", tracked_call)
        yield tracker


def compare(compiled: CompiledModule, batch: dict[str, Tensor]) -> None:
    """A first step and one that adds to its gradients, each to the byte; the outputs are held, as the model assumes."""
    loss_of(compiled(**batch)).backward()  # captures and builds, with tensors of its own; fills the ring
    for s in compiled.active_slices():
        s.grad = None
    for is_first in (True, False):
        with tracked() as tracker:
            outputs = compiled(**batch)
            with tracker:
                loss_of(outputs).backward()
        executable = compiled._training.sessions[-1].programs.last
        assert executable is not None
        predicted = max(m.nbytes for m in step_timeline(executable, "eager", is_first))
        assert predicted == tracker.peak_nbytes, (is_first, compiled.chunk)
        del outputs


@pytest.mark.parametrize(("family", "chunks"), CASES)
def test_predicted_peak_of_a_step_equals_the_tracker(family: str, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tracker sees an operator as a whole, so what the head allocates inside is left to its own tests."""
    monkeypatch.setattr(memory_model, "head_workspace", lambda node, sizes: 0)
    model, batch = tiny(family, dropout=0.1 if family in ("bert", "t5") else 0.0)
    compiled = chunkft_fx.compile(model, "8GB", chunks=chunks, interval=1, backend="eager")
    compare(compiled, batch(2, 12, 0))
    session = compiled._training.sessions[-1]
    away = frozenset(n for n, _ in model.named_parameters())
    compiled.residency.settle(away, DEPTH)
    for chunk in sorted({0, chunks // 2, chunks - 1}):
        compiled.activate(chunk)
        for save_from in (0, len(session.programs.outline.regions) // 2 + 1):
            force(compiled, save_from=save_from)
            compare(compiled, batch(2, 12, 1))
            assert any(node.target is ops.fetch for node in compiled.program.graph.nodes)
    ring = compiled._training.engines.ring(compiled.residency, session.programs.uses)
    assert ring is not None
    assert ring.depth * ring.buffer_nbytes == fixed_memory.ring_nbytes(
        dict(model.named_parameters()), session.programs.uses, away
    )


@pytest.mark.parametrize("chunks", [1, 3])
def test_the_peak_is_that_of_the_tracker_where_gradients_are_widened(chunks: int) -> None:
    """Each bfloat16 gradient is let go when its float32 copy is made, and where one is there it is added as it is."""
    model, batch = tiny("mlp", dtype=torch.bfloat16)
    compiled = chunkft_fx.compile(model, "8GB", chunks=chunks, interval=1, backend="eager")
    for chunk in range(chunks):
        compiled.activate(chunk)
        compare(compiled, batch(2, 12, 0))


def _step(family: str, **options: Any) -> tuple[CompiledModule, Session]:
    model, batch = tiny(family, **options)
    compiled = chunkft_fx.compile(model, "8GB", chunks=2, interval=1, backend="eager")
    loss_of(compiled(**batch(2, 12, 0))).backward()
    return compiled, compiled._training.sessions[-1]


def test_a_timeline_goes_through_every_region_and_ends_with_every_gradient() -> None:
    compiled, session = _step("llama")
    executable = session.programs.last
    assert executable is not None
    moments = step_timeline(executable)
    labels = [m.label for m in moments]
    regions = [r.label for r in session.programs.outline.regions]
    lowest = executable.program.lowest
    assert list(dict.fromkeys(labels)) == [f"{r} forward" for r in regions] + [
        f"{r} backward" for r in reversed(regions[lowest:])
    ]
    first = step_timeline(executable, is_first=True)
    assert first[: len(moments)] == moments
    copies = first[len(moments) :]
    assert len(copies) == len(compiled.active_slices())
    sums = sum(s.grad.nbytes for s in compiled.active_slices() if s.grad is not None)
    largest = max(s.grad.nbytes for s in compiled.active_slices() if s.grad is not None)
    # the float32 gradients themselves and one copy at a time
    assert max(m.terms["new gradients"] for m in copies) <= sums + largest
    assert copies[-1].terms["new gradients"] >= sums
    assert all(nbytes >= 0 for m in first for nbytes in m.terms.values())


def test_moments_add_up_their_terms() -> None:
    assert Moment("x", {"a": 3, "b": 4}).nbytes == 7


def test_low_precision_gradients_are_held_in_float32() -> None:
    compiled, session = _step("mlp", dtype=torch.bfloat16)
    assert session.programs.last is not None
    *_, last = step_timeline(session.programs.last, is_first=True)
    held = sum(s.grad.nbytes for s in compiled.active_slices() if s.grad is not None)
    # and beside them the bfloat16 gradient that is copied last
    copied = {s.grad.numel() * 2 for s in compiled.active_slices() if s.grad is not None}
    assert last.terms["new gradients"] - held in copied


def test_only_a_model_that_writes_buffers_keeps_copies_of_them() -> None:
    written = "copies of written buffers"
    for family, is_written in (("cnn", True), ("mlp", False)):
        compiled, session = _step(family)
        assert session.programs.last is not None
        buffers = sum(b.nbytes for b in compiled.buffers())
        assert {m.terms[written] for m in step_timeline(session.programs.last)} == {buffers if is_written else 0}


def test_a_call_with_no_gradients_has_no_backward() -> None:
    _, session = _step("mlp")
    executable = session.programs.evaluation(Policy())
    moments = step_timeline(executable, is_first=True)
    assert moments
    assert all(m.label.endswith(" forward") for m in moments)
    assert all(m.terms["new gradients"] == 0 for m in moments)


def test_storages_count_once_and_without_the_models_own() -> None:
    weight, batch = torch.zeros(10), torch.zeros(6, 2, dtype=torch.int64)
    assert storages_nbytes([weight, weight[2:], batch, batch.t(), 7]) == 40 + 96
    assert storages_nbytes([weight, batch, batch[0]], besides=[weight[:1]]) == 96

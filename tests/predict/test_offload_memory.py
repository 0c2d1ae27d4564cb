"""The predicted timeline of a step that offloads saved values against a tracker of all storages on the device.

Here device and host are the same memory. The tracker counts what is made while it watches; host copies lie in buffers
of the pool, which the step before, unwatched, has made. So a pool that did not use its buffers again would be seen.
"""

from __future__ import annotations

import itertools

import pytest

import chunkft_fx
from chunkft_fx.graph import ops
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.passes.program import offload_saved
from chunkft_fx.predict.region import memory as memory_model
from chunkft_fx.predict.step_memory import SAVED, step_timeline
from chunkft_fx.program.instructions import StreamNode
from chunkft_fx.runtime.session import Session
from chunkft_fx.tools.zoo import tiny
from tests.predict.test_step_memory import compare
from tests.program.test_structure import deep_llama, step
from tests.support.equivalence import loss_of
from tests.support.forced_policy import force


@pytest.fixture(autouse=True)
def small_values_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of tiny models are offloaded too; what the head allocates inside is left to its own tests."""
    monkeypatch.setattr(offload_saved, "SMALLEST_NBYTES", 1)
    monkeypatch.setattr(memory_model, "head_workspace", lambda node, sizes: 0)


def offloads(compiled: CompiledModule) -> bool:
    return any(node.target is ops.offload for node in compiled.program.graph.nodes)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "cnn"])
def test_predicted_peak_of_an_offloading_step_equals_the_tracker(family: str) -> None:
    model, batch = tiny(family, dropout=0.1 if family == "bert" else 0.0)
    compiled = chunkft_fx.compile(model, "8GB", chunks=3, interval=1, backend="eager")
    loss_of(compiled(**batch(2, 12, 0))).backward()
    session = compiled._training.sessions[-1]
    regions = len(session.programs.outline.regions)
    for save_from, below in ((regions, regions), (regions // 2 + 1, regions // 2 + 1), (0, regions)):
        force(compiled, save_from=save_from, offload_below=below)
        compare(compiled, batch(2, 12, 1))
        assert offloads(compiled)


def test_predicted_peak_with_streamed_weights_and_offloaded_values_equals_the_tracker() -> None:
    model, batch = tiny("llama")
    compiled = chunkft_fx.compile(model, "8GB", chunks=3, interval=1, backend="eager")
    loss_of(compiled(**batch(2, 12, 0))).backward()
    session = compiled._training.sessions[-1]
    compiled.residency.settle([n for n, _ in model.named_parameters()], 2)
    regions = len(session.programs.outline.regions)
    force(compiled, save_from=regions, offload_below=regions)
    compare(compiled, batch(2, 12, 1))
    assert offloads(compiled)


def _deep() -> tuple[CompiledModule, Session]:
    """Twelve blocks that recompute, lowest chunk active: between forward and backward the residual stream waits."""
    compiled = chunkft_fx.compile(deep_llama(12), "8GB", chunks=4, interval=1, backend="eager")
    step(compiled)
    session = compiled._training.sessions[-1]
    force(compiled, save_from=len(session.programs.outline.regions))
    return compiled, session


def test_a_deep_model_saves_what_two_blocks_keep_instead_of_all() -> None:
    compiled, session = _deep()
    residual = 2 * 8 * 64 * 4  # f32[2, 8, 64]
    kept = []
    for below in (0, len(session.programs.outline.regions)):
        force(compiled, offload_below=below)
        step(compiled)
        assert session.programs.last is not None
        backward = [m for m in step_timeline(session.programs.last) if m.label.endswith("backward")]
        kept.append(max(m.terms[SAVED] for m in backward))
    assert kept[0] - kept[1] >= 8 * residual


def test_an_offloaded_value_counts_until_its_release_and_from_its_fetch() -> None:
    compiled, session = _deep()
    regions = len(session.programs.outline.regions)
    residual = 2 * 8 * 64 * 4
    force(compiled, offload_below=regions)
    step(compiled)
    executable = session.programs.last
    assert executable is not None
    by_label = {m.label: m.terms[SAVED] for m in step_timeline(executable)}
    labels = [f"model.layers.{i} forward" for i in range(2, 11)]
    # each block's input is released behind it, when its own output has taken its place
    assert len({by_label[label] for label in labels}) == 1
    kinds = [i.call.target for i in executable.forward if isinstance(i.call, StreamNode)]
    assert kinds.count(ops.offload) == kinds.count(ops.release) == 12  # what goes into the blocks
    force(compiled, offload_below=0)
    step(compiled)
    assert session.programs.last is not None
    resident = {m.label: m.terms[SAVED] for m in step_timeline(session.programs.last)}
    steps = [resident[b] - resident[a] for a, b in itertools.pairwise(labels)]
    assert steps == [residual] * len(steps)

"""What a session keeps of its programs and variants: instructions of all, graphs only where they are asked for."""

from __future__ import annotations

import gc
import tracemalloc

import pytest
import torch

import chunkft_fx
from chunkft_fx.plan.policy import Policy
from chunkft_fx.program import variants
from chunkft_fx.tools.zoo import tiny

# Instructions and slice starts of a program of five regions take some 20 kB, its graph 150 kB.
MOST_NBYTES = 60_000


def test_programs_of_a_sweep_keep_no_graphs() -> None:
    model, batch = tiny("llama")
    compiled = chunkft_fx.compile(model, "8GB", chunks=8, interval=1, backend="eager")
    compiled(**batch(2, 16, 0))
    session = compiled._training.sessions[-1]
    programs, absent = session.programs, frozenset(session.capture.tangents) - session._expected
    for _ in range(2):  # the second time all variants are there
        programs._executables.clear()
        gc.collect()
        tracemalloc.start()
        for chunk in compiled.plan.chunks:
            programs.executable(chunk.slices, absent, Policy())
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(programs._executables) == 8
    assert taken < 8 * MOST_NBYTES
    assert all("module" not in vars(e.program) for e in programs._executables.values())


def test_a_graph_that_was_dropped_is_written_again() -> None:
    model, batch = tiny("llama")
    compiled = chunkft_fx.compile(model, "8GB", chunks=3, interval=1, backend="eager")
    compiled(**batch(2, 16, 0))
    program = compiled.program
    code = program.code
    assert program.module is program.module
    program.forget()
    assert "module" not in vars(program)
    assert program.code == code


def test_regions_that_were_dropped_are_rewritten_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for kept in (1, 64):
        monkeypatch.setattr(variants, "KEPT_REGIONS", kept)
        model, batch = tiny("llama")
        compiled = chunkft_fx.compile(model, "8GB", chunks=3, interval=1, backend="eager")
        compiled(**batch(2, 16, 0)).loss.backward()
        specializer = compiled._training.sessions[-1].programs.specializer
        assert len(specializer._specialized) <= kept
        assert len(specializer._reads) > 1
        gradients.append([s.grad for s in compiled.active_slices()])
    assert all(map(torch.equal, *gradients))

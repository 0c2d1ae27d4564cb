"""Offloaded saved values in real steps: the same gradients, host memory that is used again, and nothing left behind."""

from __future__ import annotations

import copy
import dataclasses
import gc
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.copies.saved_values import KeptCopy
from chunkft_fx.graph import ops
from chunkft_fx.graph.layout import run_strides
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.passes.program import offload_saved
from chunkft_fx.planning.planner import plan_for_batch
from chunkft_fx.tools.zoo import tiny
from tests.support.equivalence import assert_same_gradients, dense_gradients, loss_of
from tests.support.forced_policy import force


@pytest.fixture(autouse=True)
def small_values_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of tiny models are offloaded too."""
    monkeypatch.setattr(offload_saved, "SMALLEST_NBYTES", 1)


def offloading(
    family: str, save_from: int | None = None, below: int | None = None, **options: Any
) -> tuple[nn.Module, CompiledModule, Any]:
    """A model, its compiled copy in which regions below ``below`` (all) offload, and batches; chunk 0 is active."""
    model, batch = tiny(family, dtype=torch.float64, **options)
    compiled = chunkft_fx.compile(copy.deepcopy(model), "64GB", chunks=3, interval=1, backend="eager")
    compiled(**batch(2, 12, 0))
    session = compiled._training.sessions[-1]
    regions = len(session.programs.outline.regions)
    force(compiled, save_from=regions if save_from is None else save_from)
    force(compiled, offload_below=regions if below is None else below)
    return model, compiled, batch


def offloads(compiled: CompiledModule) -> int:
    """The number of values that the current program offloads."""
    nodes = compiled.program.graph.nodes
    return sum(len(n.all_input_nodes) for n in nodes if n.target is ops.offload)


def gradients(compiled: CompiledModule) -> list[Tensor]:
    return [s.grad for s in compiled.active_slices() if s.grad is not None]


def assert_equals_dense(compiled: CompiledModule, dense: dict[str, Tensor], factor: int = 1) -> None:
    for s in compiled.active_slices():
        wanted = dense[s.name] if s.slice.is_whole else dense[s.name].narrow(s.dim, s.start, s.length)
        assert s.grad is not None, s.name
        torch.testing.assert_close(s.grad, factor * wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


def is_idle(compiled: CompiledModule) -> bool:
    """Whether every host buffer is back in the pool, and there is one at all."""
    gc.collect()
    pool = compiled._training.engines.saved.pool
    return 0 < pool.nbytes == pool.free_nbytes


POLICIES = [
    pytest.param(
        family, policy, marks=() if family in ("llama", "cnn") or policy == "recompute half" else pytest.mark.slow
    )
    for family in ("llama", "gpt2", "bert", "cnn")
    for policy in ("recompute all", "recompute half", "save all", "streamed weights")
]


@pytest.mark.parametrize(("family", "policy"), POLICIES)
def test_gradients_with_offloaded_values_equal_the_dense_ones(family: str, policy: str) -> None:
    model, compiled, batch = offloading(family, dropout=0.2 if family == "bert" else 0.0)
    session = compiled._training.sessions[-1]
    regions = len(session.programs.outline.regions)
    if policy == "recompute half":
        force(compiled, save_from=regions // 2 + 1, offload_below=regions // 2 + 1)
    if policy == "save all":
        force(compiled, save_from=0)
    if policy == "streamed weights":
        compiled.residency.settle([n for n, _ in compiled.named_parameters()], 2)
    assert_same_gradients(compiled, model, batch(2, 12, 0), 1e-9)
    compiled.activate(0)
    loss_of(compiled(**batch(2, 12, 0))).backward()
    assert offloads(compiled) > 0
    assert is_idle(compiled)


def test_the_residual_stream_of_a_recomputing_model_is_not_on_the_device_between_forward_and_backward() -> None:
    _, compiled, batch = offloading("llama")

    def kept_nbytes() -> tuple[int, int]:
        step = loss_of(compiled(**batch(2, 12, 0))).grad_fn.step  # type: ignore[union-attr]
        known = {t.data_ptr() for t in [*compiled.parameters(), *compiled.buffers()]}
        values = step.slots.values()
        device = sum(v.nbytes for v in values if isinstance(v, Tensor) and v.data_ptr() not in known)
        return device, sum(v.tensor.nbytes for v in values if isinstance(v, KeptCopy))

    device, host = kept_nbytes()
    assert host == 3 * 2 * 12 * 64 * 8  # what goes into the three blocks: f64[2, 12, 64]
    force(compiled, offload_below=0)
    assert kept_nbytes() == (device + host, 0)


def test_regions_from_the_border_on_keep_their_values_on_the_device() -> None:
    _, compiled, batch = offloading("llama", below=2)
    compiled(**batch(2, 12, 0))
    assert offloads(compiled) == 1  # the input of the first block; the embedding keeps nothing of its own


def test_a_training_run_is_the_same_to_the_bit() -> None:
    runs = []
    for below in (0, 5):
        _, compiled, batch = offloading("gpt2", below=below, dropout=0.2)
        optimizer = chunkft_fx.AdamW(compiled, lr=1e-2)
        torch.manual_seed(1)
        for step in range(6):
            loss_of(compiled(**batch(2, 12, step))).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(compiled.state_dict())
    for (name, a), b in zip(runs[0].items(), runs[1].values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_before_their_backwards(order: tuple[int, int]) -> None:
    model, compiled, batch = offloading("llama")
    losses = [loss_of(compiled(**batch(2, 12, seed))) for seed in (0, 1)]
    assert compiled._training.engines.saved.pool.free_nbytes == 0
    expected: dict[str, Tensor] = {}
    for which in order:
        losses[which].backward()
        found = dense_gradients(model, batch(2, 12, which))[1]
        expected = {n: g + expected[n] if expected else g for n, g in found.items()}
        assert_equals_dense(compiled, expected)
    assert is_idle(compiled)


def test_host_memory_is_used_again_from_step_to_step() -> None:
    _, compiled, batch = offloading("llama")
    held = []
    for step in range(4):
        loss_of(compiled(**batch(2, 12, step))).backward()
        assert is_idle(compiled)
        held.append(compiled._training.engines.saved.pool.nbytes)
    assert len(set(held)) == 1


def test_a_forward_without_backward_gives_its_host_memory_back() -> None:
    _, compiled, batch = offloading("llama")
    loss = loss_of(compiled(**batch(2, 12, 0)))
    assert compiled._training.engines.saved.pool.free_nbytes == 0
    del loss
    assert is_idle(compiled)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_an_exception_halfway_leaves_nothing_behind(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, compiled, batch = offloading("llama")
    loss_of(compiled(**batch(2, 12, 0))).backward()
    before = [g.clone() for g in gradients(compiled)]
    variant = compiled.program.variants[2]  # a block in the middle: some values have gone, some have come back

    def fail(inputs: list[Any]) -> Any:
        raise RuntimeError("out of memory, say")

    def attempt() -> None:
        with pytest.raises(RuntimeError, match="say"):
            loss_of(compiled(**batch(2, 12, 1))).backward()

    with monkeypatch.context() as patch:
        patch.setattr(variant, f"run_{direction}", fail)
        attempt()
    assert is_idle(compiled)
    held = compiled._training.engines.saved.pool.nbytes
    assert all(map(torch.equal, gradients(compiled), before))
    compiled.zero_grad()
    for s in compiled.active_slices():
        s.grad = None
    loss_of(compiled(**batch(2, 12, 1))).backward()
    assert_equals_dense(compiled, dense_gradients(model, batch(2, 12, 1))[1])
    assert compiled._training.engines.saved.pool.nbytes == held


def test_retain_graph_fetches_the_same_values_again() -> None:
    model, compiled, batch = offloading("llama")
    loss = loss_of(compiled(**batch(2, 12, 0)))
    loss.backward(retain_graph=True)
    loss_of(compiled(**batch(2, 12, 1)))  # takes other buffers: those of the first forward are still held
    loss.backward()
    assert_equals_dense(compiled, dense_gradients(model, batch(2, 12, 0))[1], 2)


def test_evaluation_offloads_nothing() -> None:
    _, compiled, batch = offloading("llama")
    compiled.eval()
    with torch.no_grad():
        compiled(**batch(2, 12, 0))
    assert offloads(compiled) == 0


def test_the_plan_says_which_regions_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    def offloading_plan(*arguments: Any) -> Any:
        plan = plan_for_batch(*arguments)
        return dataclasses.replace(plan, policy=dataclasses.replace(plan.policy, save_from=5, offload_below=2))

    monkeypatch.setattr("chunkft_fx.planning.coverage.auto.known_or_made", offloading_plan)
    model, batch = tiny("llama", dtype=torch.float64)
    compiled = chunkft_fx.compile(model, "64GB", chunks=2, interval=1, backend="eager")
    counts = []
    for chunk in (0, 1):
        compiled.activate(chunk)
        compiled(**batch(2, 12, 0))
        counts.append(offloads(compiled))
    assert counts[0] == 1  # what goes into the one block below the border
    assert counts[1] == 0  # its lowest region with a backward lies above the border
    assert compiled.program.lowest >= 2


def test_offload_is_a_copy_and_has_a_fake() -> None:
    value = torch.arange(6.0).view(2, 3).t()
    (host,) = ops.offload([value])
    assert torch.equal(host, value)
    assert host.stride() == value.stride()
    assert host.data_ptr() != value.data_ptr()
    torch.library.opcheck(ops.offload, ([value],), test_utils=("test_schema", "test_faketensor"))


@given(st.lists(st.integers(1, 4), max_size=4).flatmap(lambda n: st.tuples(st.just(n), st.permutations(range(len(n))))))
def test_run_strides_of_a_dense_tensor_are_its_own(drawn: tuple[list[int], list[int]]) -> None:
    shape, order = drawn
    tensor = torch.empty(shape).permute(order)
    found = run_strides(tensor.shape, tensor.stride())
    assert all(a == b for n, a, b in zip(tensor.shape, tensor.stride(), found, strict=True) if n > 1)
    gaps = torch.empty([2 * n for n in shape])[tuple(slice(None, None, 2) for _ in shape)].permute(order)
    dense = torch.empty_strided(gaps.shape, run_strides(gaps.shape, gaps.stride()))
    assert dense.untyped_storage().nbytes() == 4 * gaps.numel()

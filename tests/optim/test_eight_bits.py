"""Moments in 8 bits: the same states however parameters are cut, the bytes that they take, and torchao's updates."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chunkft_fx.copies.host_memory import PAGE_NBYTES
from chunkft_fx.copies.states.batches import stage_places
from chunkft_fx.copies.states.stage import FreshStage
from chunkft_fx.errors import ChunkFTWarning, HostMemoryExceeded
from chunkft_fx.gradients.slices import ActiveSlice
from chunkft_fx.kernels.adamw.fused import SliceUpdate, adamw
from chunkft_fx.optim.rules.adamw import AdamW
from chunkft_fx.optim.states.host_states import HostStates
from chunkft_fx.plan import pieces
from chunkft_fx.plan.cuts import cut, cut_dim
from chunkft_fx.plan.policy import Policy
from chunkft_fx.plan.state_spec import StateSpec, StateTensor, stage_capacity_nbytes
from chunkft_fx.planning.planner import parameter_specs
from chunkft_fx.predict.fixed_memory import host_terms
from tests.support.block_net import BLOCKS, block_compiled, block_net
from tests.support.eight_bits import (
    BF16,
    MOMENTS,
    OPTIONS,
    assert_same_states,
    assert_same_weights,
    made,
    sweeps,
    through_a_file,
    trained,
)

EIGHT = StateSpec(
    "AdamW", (StateTensor("exp_avg", "8bit"), StateTensor("exp_avg_sq", "8bit", is_signed=False)), master="remainder"
)


def test_what_is_kept_in_8_bits_and_what_is_not() -> None:
    module, optimizer = made(chunks=1)
    sweeps(module, optimizer, range(1))
    for name, p in module.named_parameters():
        state = optimizer.state[p]
        if name not in BLOCKS:  # vectors, and rows of less than 64
            assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.float32, torch.float32)
            continue
        assert state.keys() - {"slice_steps", "master"} == {f"{m}_{t}" for m, _ in MOMENTS for t in ("codes", "scales")}
        for moment, _ in MOMENTS:
            codes, scales = state[f"{moment}_codes"], state[f"{moment}_scales"]
            assert (codes.dtype, codes.shape) == (torch.uint8, p.shape)
            assert (scales.dtype, scales.shape) == (torch.float32, (p.shape[cut_dim(p.shape)], BLOCKS[name]))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(9, 64), (9, 256), (7, 300), (5, 3, 100), (8, 513)]),
    cuts=st.lists(st.integers(1, 8), max_size=4),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.float32, BF16, torch.float16]),
)
def test_any_cut_of_a_slice_gives_the_states_of_none(
    shape: tuple[int, ...], cuts: list[int], seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> Tensor:
        return torch.randn(shape, generator=generator)

    weight, gradients = drawn().to(dtype), [drawn() * 10.0**-k for k in range(3)]
    found = []
    borders = sorted({0, shape[0], *(c for c in cuts if c < shape[0])})
    for parts in ([0, shape[0]], borders):
        codes = [torch.zeros(shape, dtype=torch.uint8) for _ in range(2)]
        scales = [torch.zeros(shape[0], -(-weight[0].numel() // 256)) for _ in range(2)]
        own, master = weight.clone(), None if dtype == torch.float32 else weight.float()
        for step, gradient in enumerate(gradients, start=1):
            at = [slice(a, b) for a, b in itertools.pairwise(parts)]
            kept = [None if master is None else master[a] for a in at]
            updates = [
                SliceUpdate(own[a], gradient[a], m, codes[0][a], codes[1][a], step, scales[0][a], scales[1][a])
                for a, m in zip(at, kept, strict=True)
            ]
            adamw(updates, lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
        found.append([own, *codes, *scales])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_chunks_give_the_states_of_one_chunk(dtype: torch.dtype) -> None:
    one, optimizer = made(dtype, chunks=1)
    sweeps(one, optimizer, range(4))
    whole = optimizer.state_dict()
    for chunks in (2, 7, 31):
        module, own = made(dtype, chunks)
        sweeps(module, own, range(4))
        assert any(not s.is_whole for c in module.plan.chunks for s in c.slices)
        assert_same_states(whole, own.state_dict())
        assert_same_weights(one, module)


@pytest.mark.parametrize("master", ["float32", "remainder"])
def test_pieces_and_updates_in_the_backward_give_the_states_of_one_chunk(
    monkeypatch: pytest.MonkeyPatch, master: str
) -> None:
    one, optimizer = made(chunks=1, master=master)
    trained(one, optimizer, range(6))
    monkeypatch.setattr(pieces, "LEAST_PIECES", 7)  # of the bytes of this model, so that matrices are cut
    for update in ("step", "backward"):
        module = block_compiled(block_net(BF16), coverage="all")
        own = AdamW(module, **OPTIONS, state_dtype="8bit", master=master, update=update)
        trained(module, own, range(6))
        assert any(not s.is_whole for piece in module.plan.policy.pieces for s in piece.slices)
        assert_same_states(optimizer.state_dict(), own.state_dict())
        assert_same_weights(one, module)


def test_a_run_goes_on_with_other_chunks_as_if_it_had_always_had_them() -> None:
    straight, optimizer = made(chunks=2)
    sweeps(straight, optimizer, range(6))
    first, begun = made(chunks=5)
    sweeps(first, begun, range(3))
    saved = through_a_file({"model": first.state_dict(), "optimizer": begun.state_dict()})
    module, resumed = made(chunks=2, seed=9)
    module.load_state_dict(saved["model"])
    with pytest.warns(ChunkFTWarning, match="saved with 5 chunks"):
        resumed.load_state_dict(saved["optimizer"])
    sweeps(module, resumed, range(3, 6))
    assert_same_states(optimizer.state_dict(), resumed.state_dict())
    assert_same_weights(straight, module)


def test_float64_parameters_keep_float64_moments() -> None:
    (a, one), (b, other) = made(torch.float64, state_dtype="float32"), made(torch.float64)
    for module, optimizer in ((a, one), (b, other)):
        sweeps(module, optimizer, range(2))
    assert all(state["exp_avg"].dtype == torch.float64 for state in other.state.values())
    assert_same_states(one.state_dict(), other.state_dict())
    narrow, begun = made(torch.float32)
    sweeps(narrow, begun, range(2))
    other.load_state_dict(begun.state_dict())  # widened
    assert other.state_dict()["state"][0]["exp_avg"].dtype == torch.float64


@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.99)])
def test_without_a_first_moment_updates_equal_those_with_one(betas: tuple[float, float]) -> None:
    module, optimizer = made(betas=betas)
    for group in optimizer.param_groups:
        group["betas"] = (0.0, 0.99)
    sweeps(module, optimizer, range(3))
    state = optimizer.state_dict()["state"][0]
    assert ("exp_avg_codes" in state) == (betas[0] != 0)
    plain, other = made(betas=(0.0, 0.99))
    sweeps(plain, other, range(3))
    assert_same_weights(module, plain)
    resumed = made(betas=(0.0, 0.99))[1]
    resumed.load_state_dict(optimizer.state_dict())  # a first moment that nothing reads is left out
    assert "exp_avg_codes" not in resumed.state_dict()["state"][0]


def test_reset_states_begin_as_zeros_in_8_bits() -> None:
    """Kept and reset states are the same as long as no chunk comes twice."""
    (a, keeps), (b, resets) = made(chunks=4), made(chunks=4, states="reset")
    for module, optimizer in ((a, keeps), (b, resets)):
        sweeps(module, optimizer, range(1))
    assert_same_weights(a, b)
    sweeps(b, resets, range(1, 2))
    assert resets.state_dict()["state"] == {}


def test_the_bytes_of_states_are_those_promised() -> None:
    needed = sum(EIGHT.slice_nbytes(p, p.shape[cut_dim(p.shape)]) for p in block_net(BF16).parameters())
    by_hand = 0
    for name, p in block_net(BF16).named_parameters():
        scales = 4 * BLOCKS[name] * p.shape[cut_dim(p.shape)] if name in BLOCKS else 0
        by_hand += p.numel() * (4 if name in BLOCKS else 10) + 2 * scales
    assert needed == by_hand
    module, _ = made(master="remainder", host_budget=needed)
    assert HostStates(list(module.parameters()), EIGHT).nbytes(pinned=False) == needed
    with pytest.raises(HostMemoryExceeded) as caught:
        made(master="remainder", host_budget=needed - 1)
    assert "state_dtype" not in str(caught.value)
    with pytest.raises(HostMemoryExceeded, match=r'use .*state_dtype="8bit"'):
        made(state_dtype="bfloat16", host_budget=1)


@pytest.mark.parametrize("row", [4096, 3584])
def test_a_matrix_of_a_large_model_takes_little_more_than_4_bytes_an_element(row: int) -> None:
    matrix = torch.empty(512, row, dtype=BF16, device="meta")
    assert EIGHT.slice_nbytes(matrix, 512) / matrix.numel() == 4 + 2 * 4 / 256
    assert HostStates([matrix], EIGHT).nbytes(pinned=False) == EIGHT.slice_nbytes(matrix, 512)


@pytest.mark.parametrize("chunks", [1, 5, 40])
def test_chunks_and_the_stage_count_every_byte(chunks: int) -> None:
    module, optimizer = made(chunks=chunks, states="reset", master="remainder")
    parameters = dict(module.named_parameters())
    sweeps(module, optimizer, range(1))
    stage = optimizer.stage
    assert isinstance(stage, FreshStage)
    most = max(stage_capacity_nbytes(c, parameters, optimizer.spec) for c in module.plan.chunks)
    assert stage._arena.numel() == most
    for chunk in cut(parameter_specs(module._model, EIGHT), chunks):
        lengths = [(parameters[s.name], s.length, s.size) for s in chunk.slices]
        assert chunk.numel == sum(p.numel() // size * length for p, length, size in lengths)
        assert chunk.nbytes == sum(p.nbytes // size * n + EIGHT.slice_nbytes(p, n) for p, n, size in lengths)


@pytest.mark.parametrize("coverage", ["one", "all"])
def test_device_memory_is_predicted_to_the_byte(monkeypatch: pytest.MonkeyPatch, coverage: str) -> None:
    monkeypatch.setattr(pieces, "LEAST_PIECES", 7)
    options: dict[str, Any] = {"chunks": 3} if coverage == "one" else {"coverage": "all"}
    module = block_compiled(block_net(BF16), **options)
    optimizer = AdamW(module, **OPTIONS, state_dtype="8bit", master="remainder")
    trained(module, optimizer, range(3))
    plan, parameters = module.plan, dict(module.named_parameters())
    assert plan.policy.states == optimizer.spec
    taken = []
    for part in plan.policy.pieces or plan.chunks:
        host = [t for s in part.slices for t in optimizer._states.host(ActiveSlice(s, parameters[s.name]))]
        taken.append(stage_places(host)[1])
    terms = dict(plan.terms)
    if coverage == "one":
        assert terms["optimizer state of the active chunk"] == max(taken)
    else:
        assert terms["ring of optimizer states"] == plan.policy.pieces.depth * max(taken)


def test_host_memory_is_predicted_to_the_page() -> None:
    model = block_net(BF16)
    (whole,) = cut(parameter_specs(model, EIGHT), 1)
    predicted = host_terms(dict(model.named_parameters()), [whole], Policy(), EIGHT)["optimizer states"]
    assert 0 <= HostStates(list(model.parameters()), EIGHT).nbytes(pinned=True) - predicted < PAGE_NBYTES


def test_plans_are_made_again_where_8_bits_may_take_more() -> None:
    """Of a slice of few indices each of four tensors is aligned on the stage, of float32 moments two."""
    float32 = StateSpec("AdamW", (StateTensor("exp_avg"), StateTensor("exp_avg_sq", is_signed=False)))
    bfloat16 = StateSpec("AdamW", tuple(replace(t, dtype="bfloat16") for t in float32.tensors))
    eight = replace(EIGHT, master="float32")
    assert eight.covers(eight) and eight.covers(EIGHT)
    assert not any(other.covers(eight) or eight.covers(other) for other in (float32, bfloat16))


def test_updates_are_those_of_torchao() -> None:
    """From the same states: its moments differ in the last bits of float32, so that few codes are one apart."""
    theirs: Any = pytest.importorskip("torchao.optim.adam")
    kept: Any = pytest.importorskip("torchao.optim.subclass_8bit").OptimState8bit
    generator = torch.Generator().manual_seed(0)
    shape = (64, 512)
    weight = torch.randn(shape, generator=generator)
    average, square = (kept.zeros(shape, signed, 256, "cpu") for signed in (True, False))
    apart = total = 0
    for step in range(1, 31):
        gradient = torch.randn(shape, generator=generator) * 10.0 ** -(2 * torch.rand(shape, generator=generator))
        u = SliceUpdate(
            weight.clone(), gradient, None, average.codes.clone(), square.codes.clone(), step,
            average.scale.view(64, 2).clone(), square.scale.view(64, 2).clone(),
        )  # fmt: skip
        adamw([u], lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
        theirs.single_param_adam(
            weight, gradient, torch.tensor(float(step)), average, square, None, torch.tensor(1e-2), 0.9, 0.999, 0.1,
            1e-8, True, False,
        )  # fmt: skip
        torch.testing.assert_close(u.weight, weight, rtol=1e-5, atol=1e-7)
        for codes, scales, other in (
            (u.exp_avg, u.exp_avg_scales, average),
            (u.exp_avg_sq, u.exp_avg_sq_scales, square),
        ):
            assert codes is not None and scales is not None
            differ = (codes.int() - other.codes.int()).abs()
            assert differ.max() <= 1
            apart, total = apart + int(differ.sum()), total + differ.numel()
            torch.testing.assert_close(scales.view(-1), other.scale, rtol=1e-6, atol=0)
    assert apart <= total / 100_000

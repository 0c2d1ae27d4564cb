"""Moments in 8 bits: the same states however parameters are cut, checkpoints in every format, bytes, and learning."""

from __future__ import annotations

import copy
import io
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chunkft_fx.copies.host_memory import PAGE_NBYTES
from chunkft_fx.copies.states.batches import stage_places
from chunkft_fx.copies.states.stage import FreshStage
from chunkft_fx.errors import CheckpointMismatch, ChunkFTWarning, HostMemoryExceeded
from chunkft_fx.gradients.slices import ActiveSlice
from chunkft_fx.graph.layout import front
from chunkft_fx.kernels.adamw.fused import SliceUpdate, adamw
from chunkft_fx.kernels.blocks import dequantised, quantised
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.optim.rules.adamw import AdamW
from chunkft_fx.optim.states.host_states import HostStates
from chunkft_fx.plan import pieces
from chunkft_fx.plan.cuts import cut, cut_dim
from chunkft_fx.plan.policy import Policy
from chunkft_fx.plan.state_spec import StateSpec, StateTensor, stage_capacity_nbytes
from chunkft_fx.planning.planner import parameter_specs
from chunkft_fx.predict.fixed_memory import host_terms
from tests.support.block_net import BLOCKS, block_batch, block_compiled, block_net, feed_sweep

BF16 = torch.bfloat16
OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
EIGHT = StateSpec(
    "AdamW", (StateTensor("exp_avg", "8bit"), StateTensor("exp_avg_sq", "8bit", is_signed=False)), master="remainder"
)
MOMENTS = (("exp_avg", True), ("exp_avg_sq", False))


def made(
    dtype: torch.dtype = BF16, chunks: int = 3, seed: int = 0, state_dtype: str = "8bit", **options: Any
) -> tuple[CompiledModule, AdamW]:
    module = block_compiled(block_net(dtype, seed), chunks=chunks)
    return module, AdamW(module, state_dtype=state_dtype, **(OPTIONS | options))


def sweeps(module: CompiledModule, optimizer: AdamW, which: range) -> None:
    """Whole sweeps in which an element has the same gradients whatever the chunks."""
    chunks = len(module.plan.chunks)
    for sweep in which:
        for _ in range(chunks):
            feed_sweep(module, sweep)
            optimizer.step()


def trained(module: CompiledModule, optimizer: torch.optim.Optimizer, steps: range, dtype: torch.dtype = BF16) -> None:
    for step in steps:
        optimizer.zero_grad()
        module(block_batch(step, dtype)).backward()
        optimizer.step()


def through_a_file(checkpoint: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(checkpoint, file)
    loaded: dict[str, Any] = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    return loaded


def assert_same_states(a: dict[str, Any], b: dict[str, Any]) -> None:
    """The states of two checkpoints to the bit."""
    assert a["state"].keys() == b["state"].keys()
    for i, state in a["state"].items():
        assert state.keys() == b["state"][i].keys()
        for key, value in state.items():
            other = b["state"][i][key]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, (i, key)


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


def floats(state: dict[str, Tensor], name: str, signed: bool, dim: int) -> Tensor:
    """A saved moment as float32, in whichever format it is."""
    if name in state:
        return state[name].float()
    codes = front(state[f"{name}_codes"], dim)
    return dequantised(codes, state[f"{name}_scales"], signed).movedim(0, dim)


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


@pytest.mark.parametrize("moment", [1, 4, 5])
def test_resume_equals_an_uninterrupted_run(moment: int) -> None:
    """Also in the midst of a sweep, where some slices were never updated."""
    straight, optimizer = made(chunks=3, master="remainder")
    saved: dict[str, Any] = {}
    for step in range(8):
        if step == moment:
            saved = through_a_file({"model": straight.state_dict(), "optimizer": optimizer.state_dict()})
        feed_sweep(straight, step)
        optimizer.step()
    module, resumed = made(chunks=3, seed=9, master="remainder")
    resumed.load_state_dict(saved["optimizer"])
    module.load_state_dict(saved["model"])
    assert_same_states(resumed.state_dict(), saved["optimizer"])
    for step in range(moment, 8):
        feed_sweep(module, step)
        resumed.step()
    assert_same_states(optimizer.state_dict(), resumed.state_dict())
    assert_same_weights(straight, module)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_8_bits_become_float32_and_the_same_8_bits_again(dtype: torch.dtype) -> None:
    module, optimizer = made(dtype)
    sweeps(module, optimizer, range(2))
    begin = through_a_file(optimizer.state_dict())
    wide = made(dtype, state_dtype="float32")[1]
    wide.load_state_dict(begin)
    between = through_a_file(wide.state_dict())
    again = made(dtype)[1]
    again.load_state_dict(between)
    end = again.state_dict()
    for i, (_, p) in enumerate(module.named_parameters()):
        dim = cut_dim(p.shape)
        for name, signed in MOMENTS:
            values = floats(begin["state"][i], name, signed, dim)
            assert between["state"][i][name].dtype == torch.float32
            assert torch.equal(between["state"][i][name], values)
            assert torch.equal(floats(end["state"][i], name, signed, dim), values)
            if f"{name}_codes" in begin["state"][i]:
                assert torch.equal(end["state"][i][f"{name}_codes"], begin["state"][i][f"{name}_codes"])


@pytest.mark.parametrize("start", ["float32", "bfloat16"])
def test_floats_become_8_bits_as_an_update_rounds_them(start: str) -> None:
    module, optimizer = made(state_dtype=start)
    sweeps(module, optimizer, range(3))
    begin = through_a_file(optimizer.state_dict())
    narrow = made()[1]
    narrow.load_state_dict(begin)
    for i, (name, p) in enumerate(module.named_parameters()):
        found, dim = narrow.state_dict()["state"][i], cut_dim(p.shape)
        for moment, signed in MOMENTS:
            values = begin["state"][i][moment].float()
            if name not in BLOCKS:
                assert torch.equal(found[moment], values)
                continue
            codes, scales = quantised(front(values, dim), signed)
            assert torch.equal(front(found[f"{moment}_codes"], dim), codes)
            assert torch.equal(found[f"{moment}_scales"], scales)


def test_8_bits_become_the_nearest_bfloat16() -> None:
    module, optimizer = made()
    sweeps(module, optimizer, range(2))
    begin = through_a_file(optimizer.state_dict())
    other = made(state_dtype="bfloat16")[1]
    other.load_state_dict(begin)
    for i, (_, p) in enumerate(module.named_parameters()):
        for moment, signed in MOMENTS:
            values = floats(begin["state"][i], moment, signed, cut_dim(p.shape))
            assert torch.equal(other.state_dict()["state"][i][moment], values.bfloat16())


def test_training_goes_on_from_torchs_checkpoint_and_torch_names_what_it_misses() -> None:
    plain = block_net()
    theirs = torch.optim.AdamW(plain.parameters(), **OPTIONS)
    trained(plain, theirs, range(3), torch.float32)  # type: ignore[arg-type]  # the plain model
    module, ours = made(torch.float32, chunks=1)
    module._model.load_state_dict(plain.state_dict())
    ours.load_state_dict(theirs.state_dict())
    trained(module, ours, range(3, 5), torch.float32)
    trained(plain, theirs, range(3, 5), torch.float32)  # type: ignore[arg-type]
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        differences = (p - q).detach().abs() / OPTIONS["lr"]  # of two steps
        assert differences.mean() < 0.03 and differences.max() < 1
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    with pytest.raises(KeyError, match="exp_avg"):
        trained(plain, theirs, range(5, 6), torch.float32)  # type: ignore[arg-type]


def test_states_saved_while_another_dimension_was_cut_are_converted() -> None:
    module, optimizer = made(chunks=1)
    sweeps(module, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    at = [name for name, _ in module.named_parameters()].index("across")
    saved["chunkft"]["parameters"][at][2] = 2
    values = {}
    for moment, signed in MOMENTS:
        value = floats(saved["state"][at], moment, signed, 1)
        codes, scales = quantised(value.movedim(2, 0).contiguous(), signed)
        saved["state"][at] |= {f"{moment}_codes": codes.movedim(0, 2), f"{moment}_scales": scales}
        values[moment] = dequantised(codes, scales, signed).movedim(0, 2)
    saved["state"][at]["slice_steps"] = [[0, 60, 2]]
    other = made(chunks=1)[1]
    other.load_state_dict(saved)
    for moment, signed in MOMENTS:
        codes, scales = quantised(front(values[moment], 1), signed)
        found = other.state_dict()["state"][at]
        assert torch.equal(front(found[f"{moment}_codes"], 1), codes)
        assert torch.equal(found[f"{moment}_scales"], scales)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("exp_avg_scales"), r"holds .*'exp_avg_codes'"),
        (lambda s: s.update(exp_avg=s.pop("exp_avg_codes")), "holds"),
        (lambda s: s.update(exp_avg=torch.zeros(300, 256)), "holds"),
        (lambda s: s.update(master_codes=s["exp_avg_codes"], master_scales=s["exp_avg_scales"]), "holds"),
        (lambda s: s.update(exp_avg_scales=s["exp_avg_scales"][:-1]), r"exp_avg_scales .*it must be \(300, 1\)"),
        (lambda s: s.update(exp_avg_codes=s["exp_avg_codes"][:-1]), r"exp_avg_codes .*it must be \(300, 256\)"),
        (lambda s: s.update(exp_avg_codes=s["exp_avg_codes"].float()), "float32, not torch.uint8"),
        (lambda s: s.update(exp_avg_scales=s["exp_avg_scales"].double()), "float64, not torch.float32"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(change: Any, message: str) -> None:
    module, optimizer = made(chunks=1)
    sweeps(module, optimizer, range(1))
    broken = copy.deepcopy(optimizer.state_dict())
    at = [name for name, _ in module.named_parameters()].index("first.weight")
    change(broken["state"][at])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointMismatch, match=message):
        optimizer.load_state_dict(broken)
    assert_same_states(before, optimizer.state_dict())


def test_numbers_of_codes_are_not_taken_for_moments() -> None:
    module, optimizer = made(torch.float32, chunks=1, state_dtype="float32")
    sweeps(module, optimizer, range(1))
    broken = copy.deepcopy(optimizer.state_dict())
    broken["state"][0]["exp_avg"] = broken["state"][0]["exp_avg"].to(torch.uint8)
    with pytest.raises(CheckpointMismatch, match="uint8"):
        optimizer.load_state_dict(broken)


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
    assert apart <= total / 20_000

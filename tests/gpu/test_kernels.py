"""The kernels on CUDA, on device and pinned host memory, against the spelled-out update and torch's AdamW."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chunkft_fx.errors import OptionError
from chunkft_fx.kernels.adamw.fused import adamw, launch_adamw
from chunkft_fx.kernels.adamw.reference import SliceUpdate, adamw_reference
from chunkft_fx.kernels.launch import LaunchOptions
from tests.kernels.operands import (
    Spec,
    assert_same_memory,
    build,
    specs,
    spelled_out,
    ulps,
    wide_weight,
)

pytestmark = pytest.mark.gpu

OPTIONS: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
# few programs for many tiles, so that every program walks over several tiles and slices
SMALL = LaunchOptions(tile=256, num_warps=2, per_multiprocessor=1, on_host=3)
PLAIN = Spec((9, 40), (0, 1), 0, 2, 5, torch.bfloat16, torch.float32, "front", 0, 3, 0)
STATES = ("master", "exp_avg", "exp_avg_sq", "exp_avg_scales", "exp_avg_sq_scales")


@dataclasses.dataclass(frozen=True)
class Place:
    """Puts the operands of these names into pinned host memory, the others on the device."""

    pinned: frozenset[str]

    def __call__(self, name: str, buffer: Tensor) -> Tensor:
        return buffer.pin_memory() if name in self.pinned else buffer.cuda()


places = st.builds(Place, st.frozensets(st.sampled_from(["weight", *STATES])))
ON_DEVICE = Place(frozenset())
STATES_ON_HOST = Place(frozenset(STATES))


@contextmanager
def no_synchronization() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@settings(max_examples=25)
@given(
    drawn=st.lists(st.tuples(specs(), places), min_size=1, max_size=3),
    launch=st.sampled_from([None, SMALL]),
    seed=st.integers(0, 2**64 - 1),
    scale=st.sampled_from([None, 0.37]),
)
def test_adamw_equals_the_spelled_out_update(
    drawn: list[tuple[Spec, Place]], launch: LaunchOptions | None, seed: int, scale: float | None
) -> None:
    ours = [build(spec, place) for spec, place in drawn]
    expected = [build(spec) for spec, _ in drawn]
    on_device = None if scale is None else torch.tensor(scale, device="cuda")
    launch_adamw([c.update for c in ours], **OPTIONS, scale=on_device, seed=seed, launch=launch)
    torch.cuda.synchronize()
    for index, case in enumerate(expected):
        factor = None if scale is None else torch.tensor(scale)
        spelled_out(case.update, index, **OPTIONS, scale=factor, seed=seed)
    for a, b in zip(ours, expected, strict=True):
        assert_same_memory(a, b)


@pytest.mark.parametrize(
    "place", [ON_DEVICE, STATES_ON_HOST, Place(frozenset({"weight", *STATES}))], ids=("device", "host", "weight too")
)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_thousand_slices_take_several_steps_without_a_wait(place: Place, state_dtype: torch.dtype) -> None:
    # rows and columns of bf16 weights, and norms
    kinds = [((70, 33), 0, torch.bfloat16), ((32, 128), 1, torch.bfloat16), ((128,), 0, torch.float32)]
    drawn = [
        dataclasses.replace(
            PLAIN,
            shape=shape,
            order=tuple(range(len(shape))),
            dim=dim,
            start=seed % 5,
            length=20 + seed % 7,
            weight_dtype=dtype,
            state_dtype=state_dtype,
            step=1 + seed % 3,
            seed=seed,
        )
        for seed in range(334)
        for shape, dim, dtype in kinds
    ]
    ours, expected = [build(spec, place) for spec in drawn], [build(spec) for spec in drawn]
    adamw([c.update for c in ours], **OPTIONS, seed=0)
    with no_synchronization():
        for step in (1, 2):
            updates = [dataclasses.replace(c.update, step=c.update.step + step) for c in ours]
            adamw(updates, **(OPTIONS | {"lr": 1e-3 / step}), seed=step)
    torch.cuda.synchronize()
    for index, case in enumerate(expected):
        for step, lr in ((0, 1e-3), (1, 1e-3), (2, 5e-4)):
            u = dataclasses.replace(case.update, step=case.update.step + step)
            spelled_out(u, index, **(OPTIONS | {"lr": lr}), seed=step)
    for a, b in zip(ours, expected, strict=True):
        assert_same_memory(a, b)


@pytest.mark.parametrize("place", [ON_DEVICE, STATES_ON_HOST], ids=["device", "host"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_masters_equal_those_of_torch_to_one_ulp(place: Place, weight_decay: float) -> None:
    options = OPTIONS | {"weight_decay": weight_decay}
    generator = torch.Generator().manual_seed(0)
    numel = 2**20 + 5
    # weights from 0.25 and steps of 0.01 at most: a step's own last bits are beyond those of the weight
    master = torch.where(torch.rand(numel, generator=generator) < 0.5, -1, 1) * (
        0.25 + torch.rand(numel, generator=generator)
    )
    gradient = torch.randn(numel, generator=generator).clamp(-3, 3)
    average = 0.1 * torch.randn(numel, generator=generator).clamp(-3, 3)
    square = 0.5 + torch.rand(numel, generator=generator)

    def update(where: Place) -> SliceUpdate:
        named = {"master": master, "exp_avg": average, "exp_avg_sq": square}
        states = {name: where(name, t.clone()) for name, t in named.items()}
        return SliceUpdate(master.bfloat16().cuda(), gradient.cuda(), step=7, **states)

    ours, functional = update(place), update(ON_DEVICE)
    adamw([ours], **options)
    adamw_reference([functional], **options)
    torch.cuda.synchronize()
    assert ours.master is not None and functional.master is not None
    found = ours.master.cpu()
    assert (ulps(found, functional.master.cpu()) <= 1).all()
    assert torch.equal(ours.weight.cpu(), found.bfloat16())
    if weight_decay == 0:  # torch's fused kernel rounds the decay itself another way
        fused = _fused_adamw(master, gradient, average, square, 7)
        assert (ulps(found, fused) <= 1).all()


@pytest.mark.parametrize("place", [ON_DEVICE, STATES_ON_HOST, Place(frozenset({"weight", *STATES}))])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_a_thousand_updates_of_remainders_equal_those_of_float32_masters(
    place: Place, state_dtype: torch.dtype, beta1: float
) -> None:
    spec = dataclasses.replace(PLAIN, shape=(70, 333), start=3, length=60, state_dtype=state_dtype)
    drawn = [dataclasses.replace(spec, dim=dim, step=1 + 500 * dim, has_exp_avg=beta1 != 0) for dim in (0, 1)]
    wide, narrow = ([build(s, place).update for s in drawn] for _ in range(2))
    for u in wide:
        assert u.master is not None
        u.master.copy_(u.weight)
    narrow = [
        dataclasses.replace(u, master=place("master", torch.zeros(u.weight.shape, dtype=torch.int16))) for u in narrow
    ]
    generator = torch.Generator("cuda").manual_seed(0)
    for step in range(1000):
        gradients = [torch.randn(u.weight.shape, generator=generator, device="cuda").bfloat16() for u in wide]
        for side in (wide, narrow):
            updates = [
                dataclasses.replace(u, gradient=g, step=u.step + step) for u, g in zip(side, gradients, strict=True)
            ]
            adamw(updates, **(OPTIONS | {"beta1": beta1}), seed=step)
    torch.cuda.synchronize()
    for a, b in zip(wide, narrow, strict=True):
        assert torch.equal(wide_weight(a), wide_weight(b))
        assert torch.equal(a.exp_avg_sq, b.exp_avg_sq)
        assert not torch.equal(wide_weight(a), a.weight.float().cpu())


def _fused_adamw(master: Tensor, gradient: Tensor, average: Tensor, square: Tensor, step: int) -> Tensor:
    """The weights after one step of torch's fused AdamW on CUDA, without weight decay."""
    param = torch.nn.Parameter(master.cuda())
    param.grad = gradient.cuda()
    optimizer = torch.optim.AdamW([param], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    optimizer.state[param] = {
        "step": torch.tensor(float(step - 1), device="cuda"),
        "exp_avg": average.cuda(),
        "exp_avg_sq": square.cuda(),
    }
    optimizer.step()
    return param.detach().cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learning_rate_may_be_a_tensor_on_the_device(dtype: torch.dtype) -> None:
    lr = torch.tensor(3e-3, dtype=dtype)
    ours, expected = build(PLAIN, ON_DEVICE), build(PLAIN)
    adamw([ours.update], **(OPTIONS | {"lr": lr.cuda()}))
    spelled_out(expected.update, 0, **(OPTIONS | {"lr": float(lr)}))
    torch.cuda.synchronize()
    assert_same_memory(ours, expected)


def test_bfloat16_second_moment_decays() -> None:
    numel, steps = 2**20, 100
    weight, zeros = torch.zeros(numel, device="cuda"), torch.zeros(numel, device="cuda")
    average, square = zeros.bfloat16(), torch.ones_like(zeros).bfloat16()
    for step in range(1, steps + 1):
        adamw([SliceUpdate(weight, zeros, None, average, square, step)], **OPTIONS, seed=step)
    # one rounding moves an element by 2**-8 at most, a hundred by 0.04: the mean of 2**20 is good to 4e-5 (one sigma)
    assert abs(square.double().mean().item() - 0.999**steps) < 2e-4
    assert not average.any()


def test_memory_that_the_kernel_cannot_reach_is_refused() -> None:
    u = build(PLAIN, ON_DEVICE).update
    assert u.master is not None and u.exp_avg is not None
    changes: tuple[dict[str, Any], ...] = (
        {"master": u.master.cpu()},
        {"exp_avg": u.exp_avg.cpu()},
        {"weight": u.weight.cpu()},
    )
    for change in changes:
        with pytest.raises(OptionError, match="pinned host memory"):
            adamw([dataclasses.replace(u, **change)], **OPTIONS)
    with pytest.raises(OptionError, match="scale is on cpu"):
        adamw([u], **OPTIONS, scale=torch.tensor(1.0))


def test_float64_is_updated_by_torch() -> None:
    weight, gradient = (torch.randn(5, 3, dtype=torch.float64) for _ in range(2))
    pairs = []
    for device in ("cpu", "cuda"):
        average, square = torch.zeros(2, 5, 3, dtype=torch.float64, device=device)
        pairs.append(SliceUpdate(weight.to(device, copy=True), gradient.to(device), None, average, square, 1))
    for u in pairs:
        adamw([u], **OPTIONS)
    torch.testing.assert_close(pairs[1].weight.cpu(), pairs[0].weight, rtol=1e-14, atol=0)

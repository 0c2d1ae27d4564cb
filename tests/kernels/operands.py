"""Random slices for the AdamW kernel, in any layout and memory, and the update spelled out as their oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from chunkft_fx.kernels.adamw.reference import SliceUpdate, random_words, round_stochastically
from chunkft_fx.kernels.masters import join_master, split_master
from tests.kernels.block_format import dequantised_slowly, quantised_slowly

# Elements before and after each operand that no update may touch.
MARGIN = 16
CANARY = 7.0

# Moves a flat buffer to where an operand of this name is to lie; it must keep the values.
Placement = Callable[[str, Tensor], Tensor]


def in_place(_: str, buffer: Tensor) -> Tensor:
    return buffer


@dataclass(frozen=True)
class Spec:
    """A slice ``start, length`` along ``dim`` of a parameter, and how its operands lie in memory.

    ``order`` lists the parameter's dimensions from the outermost in memory to the innermost; the gradient is
    contiguous with the cut dimension in front (``"front"``), in the parameter's order (``"same"``) or in plain
    order (``"plain"``). Operands begin ``offset`` elements after an aligned address. A master ``is_remainder``, or a
    float32; only updates with ``beta1`` 0 can do without a first moment.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    dim: int
    start: int
    length: int
    weight_dtype: torch.dtype
    state_dtype: torch.dtype
    gradient_order: str
    offset: int
    step: int
    seed: int
    gradient_dtype: torch.dtype = torch.float32
    is_remainder: bool = False
    has_exp_avg: bool = True


@dataclass
class Case:
    """An update, and by operand the whole buffer in which it lies, margins included."""

    update: SliceUpdate
    buffers: dict[str, Tensor]


@st.composite
def specs(draw: st.DrawFn, largest: int = 20_000) -> Spec:
    """Slices of parameters of at most ``largest`` elements."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 5, 16, 32, 70]), min_size=1, max_size=4)))
    while prod(shape) > largest:
        shape = shape[1:]
    plain = tuple(range(len(shape)))
    orders = [plain]
    if len(shape) == 4:
        orders.append((0, 2, 3, 1))  # channels last
    elif len(shape) > 1:
        orders.append(plain[::-1])
    order = draw(st.sampled_from(orders))
    # channels last is never cut along height or width
    dim = draw(st.sampled_from(plain if order in (plain, plain[::-1]) else plain[:2]))
    length = draw(st.integers(1, shape[dim]))
    weight_dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    return Spec(
        shape=shape,
        order=order,
        dim=dim,
        start=draw(st.integers(0, shape[dim] - length)),
        length=length,
        weight_dtype=weight_dtype,
        state_dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8])),
        gradient_order=draw(st.sampled_from(["front", "same", "plain"])),
        offset=draw(st.sampled_from([0, 0, 1])),
        step=draw(st.sampled_from([1, 2, 10, 1000, 100_000])),
        seed=draw(st.integers(0, 2**16)),
        gradient_dtype=draw(st.sampled_from([torch.float32, weight_dtype])),
        is_remainder=weight_dtype == torch.bfloat16 and draw(st.booleans()),
    )


def build(spec: Spec, place: Placement = in_place) -> Case:
    """The slice's operands, the same values each time: weights of order 1, half of the masters out of date."""
    generator = torch.Generator().manual_seed(spec.seed)
    buffers: dict[str, Tensor] = {}

    def operand(name: str, values: Tensor, order: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        flat = torch.full((values.numel() + 2 * MARGIN,), CANARY, dtype=dtype)
        inside = slice(MARGIN + spec.offset, MARGIN + spec.offset + values.numel())
        flat[inside] = values.permute(order).reshape(-1).to(dtype)
        buffers[name] = place(name, flat)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return buffers[name][inside].view([values.shape[d] for d in order]).permute(inverse)

    def cut(parameter: Tensor) -> Tensor:
        return parameter.narrow(spec.dim, spec.start, spec.length).movedim(spec.dim, 0)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    plain = tuple(range(len(spec.shape)))
    values = normal(spec.shape)
    parameter = operand("weight", values, spec.order, spec.weight_dtype)
    weight = cut(parameter)
    shape = tuple(weight.shape)
    grad = normal(shape)
    if spec.gradient_order == "front":
        gradient = operand("gradient", grad, plain, spec.gradient_dtype)
    else:
        order = spec.order if spec.gradient_order == "same" else plain
        gradient = operand("gradient", grad.movedim(0, spec.dim), order, spec.gradient_dtype).movedim(spec.dim, 0)
    master = None
    if spec.is_remainder:
        drawn = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)
        master = operand("master", drawn, plain, torch.int16)
    elif spec.weight_dtype != torch.float32:
        known = cut(values.to(spec.weight_dtype).float() * (1 + 1e-4 * torch.rand(spec.shape, generator=generator)))
        stale = torch.rand(shape, generator=generator) < 0.5
        master = operand("master", torch.where(stale, normal(shape), known), plain, torch.float32)

    def moment(name: str, values: Tensor) -> tuple[Tensor, Tensor | None]:
        if spec.state_dtype != torch.uint8:
            return operand(name, values, plain, spec.state_dtype), None
        codes, scales = quantised_slowly(values, signed=name == "exp_avg")
        return operand(name, codes, plain, torch.uint8), operand(f"{name}_scales", scales, (0, 1), torch.float32)

    average, average_scales = moment("exp_avg", 0.1 * normal(shape)) if spec.has_exp_avg else (None, None)
    square, square_scales = moment("exp_avg_sq", normal(shape).square())
    u = SliceUpdate(weight, gradient, master, average, square, spec.step, average_scales, square_scales)
    return Case(u, buffers)


def spelled_out(
    u: SliceUpdate,
    index: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: Tensor | None = None,
    seed: int = 0,
) -> None:
    """The update in place, one torch operator for each operation of the kernel, on the CPU.

    No operator combines two roundings into one, so that each result is the only correct one; the root is numpy's,
    because torch's is up to 1 ulp off on some processors.
    """

    def float32(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32)

    param = u.weight.float()
    is_remainder = False
    if u.master is not None:
        master = u.master.view(param.shape)
        is_remainder = master.dtype == torch.int16
        known = torch.where(master.to(u.weight.dtype) == u.weight, master, param)
        param = join_master(u.weight, master) if is_remainder else known
    grad = u.gradient.float() if scale is None else u.gradient.float() * scale
    square = _moment(u.exp_avg_sq, u.exp_avg_sq_scales, signed=False).view(param.shape)
    rest1, rest2 = float32(1 - beta1), float32(1 - beta2)
    param = param * float32(1 - lr * weight_decay)
    average = grad
    if u.exp_avg is not None:
        average = _moment(u.exp_avg, u.exp_avg_scales, signed=True).view(param.shape)
        change = grad - average
        average = average + rest1 * change if rest1 < 0.5 else grad - change * (1 - rest1)
    square = square * float32(beta2) + rest2 * grad * grad
    root = torch.from_numpy(np.sqrt(square.numpy()))
    denominator = root / float32((1 - beta2**u.step) ** 0.5) + float32(eps)
    param = param - float32(lr / (1 - beta1**u.step)) * average / denominator
    if u.exp_avg_sq.dtype == torch.bfloat16:
        noise = random_words(seed, index, param.numel(), param.device).view(param.shape)
        average, square = round_stochastically(average, noise & 0xFFFF), round_stochastically(square, noise >> 16)
    if u.exp_avg is not None and u.exp_avg_scales is not None:
        average, scales = quantised_slowly(average, signed=True)
        u.exp_avg_scales.copy_(scales)
    if u.exp_avg_sq_scales is not None:
        square, scales = quantised_slowly(square, signed=False)
        u.exp_avg_sq_scales.copy_(scales)
    weight, kept = split_master(param) if is_remainder else (param, param)
    for target, value in ((u.weight, weight), (u.master, kept), (u.exp_avg, average), (u.exp_avg_sq, square)):
        if target is not None:
            target.copy_(value)


def _moment(kept: Tensor, scales: Tensor | None, signed: bool) -> Tensor:
    return kept.float() if scales is None else dequantised_slowly(kept, scales, signed)


def wide_weight(u: SliceUpdate) -> Tensor:
    """The weight in float32, in host memory, with all bits that its master or its remainder has."""
    if u.master is None:
        return u.weight.cpu()
    kept = u.master.view(u.weight.shape).cpu()
    return join_master(u.weight.cpu(), kept) if kept.dtype == torch.int16 else kept


def assert_same_memory(ours: Case, expected: Case) -> None:
    """Every buffer is equal, margins and the rest of the parameter included."""
    assert ours.buffers.keys() == expected.buffers.keys()
    for name, buffer in expected.buffers.items():
        found = ours.buffers[name].cpu()
        same = (found == buffer) | (found.isnan() & buffer.isnan())
        assert same.all(), f"{name}: {found[~same]} instead of {buffer[~same]} at {(~same).nonzero().view(-1)}"


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many float32 numbers lie between a and b, of one sign."""
    return (a.contiguous().view(torch.int32).long() - b.contiguous().view(torch.int32).long()).abs()


def product_operands(
    first: tuple[int, int], second: tuple[int, int], dtype: torch.dtype, layout: str, device: str, seed: int
) -> tuple[Tensor, Tensor]:
    """Two matrices of these sizes: ``"whole"``, ``"columns"`` of wider ones, or ``"transposed"`` in memory.

    Columns begin at a multiple of 16 bytes, and around them stands what must not be read.
    """
    generator = torch.Generator().manual_seed(seed)

    def make(rows: int, columns: int) -> Tensor:
        values = torch.randn(rows, columns, generator=generator).to(dtype).to(device)
        if layout == "transposed":
            return values.t().contiguous().t()
        if layout == "whole":
            return values
        wide = torch.full((rows, columns + 16 + -columns % 8), float("nan"), dtype=dtype, device=device)
        wide[:, 8 : 8 + columns] = values
        return wide[:, 8 : 8 + columns]

    return make(*first), make(*second)

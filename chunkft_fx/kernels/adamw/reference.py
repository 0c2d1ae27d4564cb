"""Computes what the AdamW kernel does in torch's operators: the implementation on the CPU and for float64.

With float32 or float64 moments it is torch's own functional AdamW, to the bit. bfloat16 moments are widened to
float32 for the update and rounded stochastically after it: with ``beta2 = 0.999`` a second moment shrinks by less
than half a bfloat16 step at a time, so that rounding to nearest would never let it decay. 8-bit moments are rounded to
the nearest code: a block decays by its scale, which is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from chunkft_fx.errors import OptionError
from chunkft_fx.graph.layout import blocks_of
from chunkft_fx.kernels.blocks import dequantised, quantised
from chunkft_fx.kernels.masters import join_master, reconcile, split_master

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.uint8)
MASK32 = 0xFFFFFFFF
# Philox4x32 (Salmon et al., SC 2011): multipliers, key increments, rounds.
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10


@dataclass(frozen=True)
class SliceUpdate:
    """One slice to update, every operand seen with the cut dimension in front.

    ``weight`` is bf16, f16, f32 or f64[length, ...], possibly strided; ``gradient`` has its shape, in its dtype or
    float32, with any strides. All others are contiguous and have the weight's number of elements. ``master`` is
    float32, or int16 beside a bf16 weight: its remainder (`chunkft_fx.kernels.masters`); it is `None` for a weight
    that is its own master. ``exp_avg`` and ``exp_avg_sq`` are float32 (float64 for float64 weights), bf16 or u8; the
    first is `None` where ``beta1`` is 0, which needs none. Those of u8 are codes of `chunkft_fx.kernels.blocks`, whose
    scales are f32[length, blocks]. ``step`` counts updates of this slice, this one included.
    """

    weight: Tensor
    gradient: Tensor
    master: Tensor | None
    exp_avg: Tensor | None
    exp_avg_sq: Tensor
    step: int
    exp_avg_scales: Tensor | None = None
    exp_avg_sq_scales: Tensor | None = None


def operands(u: SliceUpdate) -> dict[str, Tensor]:
    """The tensors of an update, by name."""
    named = {
        "weight": u.weight,
        "gradient": u.gradient,
        "master": u.master,
        "exp_avg": u.exp_avg,
        "exp_avg_sq": u.exp_avg_sq,
        "exp_avg_scales": u.exp_avg_scales,
        "exp_avg_sq_scales": u.exp_avg_sq_scales,
    }
    return {name: t for name, t in named.items() if t is not None}


def require_one_device(u: SliceUpdate) -> None:
    """Refuse what torch's own operators cannot update."""
    for name, operand in operands(u).items():
        if operand.device != u.weight.device:
            raise OptionError(
                f"{name} is on {operand.device}, the weight on {u.weight.device}; "
                f"a {u.gradient.dtype} slice is updated where all of it is"
            )


def check_operands(u: SliceUpdate) -> None:
    """Refuse an update whose operands do not belong together."""
    wide = torch.promote_types(u.weight.dtype, torch.float32)
    if u.gradient.shape != u.weight.shape or u.gradient.dtype not in (wide, u.weight.dtype):
        raise OptionError(
            f"the gradient is {tuple(u.gradient.shape)}, {u.gradient.dtype}; "
            f"for this weight it must be {tuple(u.weight.shape)}, {wide} or {u.weight.dtype}"
        )
    if (u.master is None) != (wide == u.weight.dtype):
        raise OptionError(f"a {u.weight.dtype} weight needs {'no' if u.master is not None else 'a'} master")
    masters = (wide, torch.int16) if u.weight.dtype == torch.bfloat16 else (wide,)
    if u.master is not None and u.master.dtype not in masters:
        raise OptionError(f"the master is {u.master.dtype}; it must be {' or '.join(map(str, masters))}")
    moments = [t for t in (u.exp_avg, u.exp_avg_sq) if t is not None]
    if len({t.dtype for t in moments}) > 1 or u.exp_avg_sq.dtype not in STATE_DTYPES:
        raise OptionError(
            f"the moments are {' and '.join(str(t.dtype) for t in moments)}; use float32, bfloat16 or uint8"
        )
    if (u.exp_avg_sq.dtype == torch.float64) != (wide == torch.float64):
        raise OptionError(f"the moments of a {u.weight.dtype} weight cannot be {u.exp_avg_sq.dtype}")
    for name, state in (("master", u.master), ("exp_avg", u.exp_avg), ("exp_avg_sq", u.exp_avg_sq)):
        if state is not None and not (state.is_contiguous() and state.numel() == u.weight.numel()):
            raise OptionError(f"{name} is {tuple(state.shape)}; it must be {tuple(u.weight.shape)} and contiguous")
    _check_scales(u)


def _check_scales(u: SliceUpdate) -> None:
    """Refuse codes without their scales, scales of another number of blocks, and scales of anything but codes."""
    expected = (len(u.weight), blocks_of(u.weight.numel() // max(len(u.weight), 1)))
    for name, state, scales in (
        ("exp_avg", u.exp_avg, u.exp_avg_scales),
        ("exp_avg_sq", u.exp_avg_sq, u.exp_avg_sq_scales),
    ):
        if state is None or state.dtype != torch.uint8:
            if scales is not None:
                raise OptionError(f"{name} has scales, which only moments in uint8 have")
        elif scales is None or scales.shape != expected or scales.dtype != torch.float32 or not scales.is_contiguous():
            found = "missing" if scales is None else f"{tuple(scales.shape)}, {scales.dtype}"
            raise OptionError(f"the scales of {name} are {found}; they must be {expected}, float32 and contiguous")


@torch.no_grad()
def adamw_reference(
    updates: Sequence[SliceUpdate],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: Tensor | None = None,
    seed: int = 0,
) -> None:
    """As `chunkft_fx.kernels.adamw.fused.adamw`, for slices whose operands are all on one device."""
    for index, u in enumerate(updates):
        shape = u.weight.shape
        master = _master(u)
        square = _widened(u.exp_avg_sq.view(shape), u.exp_avg_sq_scales, master.dtype, signed=False)
        if u.exp_avg is None:
            average = torch.zeros_like(square)
        else:
            average = _widened(u.exp_avg.view(shape), u.exp_avg_scales, master.dtype, signed=True)
        # one layout for all operands: vectorised loops then round the same way
        gradient = u.gradient.to(master.dtype).contiguous()
        torch_adamw(
            [master],
            [gradient if scale is None else gradient * scale],
            [average],
            [square],
            [],
            [torch.tensor(float(u.step - 1))],  # counted up by torch
            foreach=False,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=float(lr),
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )
        if u.exp_avg_sq.dtype == torch.bfloat16:
            noise = random_words(seed, index, master.numel(), master.device).view(shape)
            u.exp_avg_sq.view(shape).copy_(round_stochastically(square, noise >> 16))
            if u.exp_avg is not None:
                u.exp_avg.view(shape).copy_(round_stochastically(average, noise & 0xFFFF))
        for moment, kept, scales in (
            (average, u.exp_avg, u.exp_avg_scales),
            (square, u.exp_avg_sq, u.exp_avg_sq_scales),
        ):
            if kept is not None and scales is not None:
                codes, found = quantised(moment, signed=kept is u.exp_avg)
                kept.view(shape).copy_(codes)
                scales.copy_(found)
        if u.master is not None and u.master.dtype == torch.int16:
            master, remainder = split_master(master)
            u.master.view(shape).copy_(remainder)
        u.weight.copy_(master, non_blocking=True)


def _widened(moment: Tensor, scales: Tensor | None, dtype: torch.dtype, signed: bool) -> Tensor:
    """A moment as it is updated: itself if it is wide already."""
    return moment.to(dtype) if scales is None else dequantised(moment, scales, signed)


def _master(u: SliceUpdate) -> Tensor:
    """The wide weight that is updated: in place where the update has one, and else a copy or the weight itself."""
    if u.master is None:
        return u.weight.contiguous()
    kept = u.master.view(u.weight.shape)
    if kept.dtype == torch.int16:
        return join_master(u.weight, kept).contiguous()
    reconcile(kept, u.weight)
    return kept


def round_stochastically(value: Tensor, noise: Tensor) -> Tensor:
    """float32 rounded to bfloat16, up in magnitude if the dropped bits plus ``noise`` (0 to 65535) carry.

    The mean over uniform noise is the value itself; a value that bfloat16 holds is never changed.
    """
    carried = (value.view(torch.int32) + noise.to(torch.int32)) & -0x10000
    return torch.where(value.isfinite(), carried.view(torch.float32), value).to(torch.bfloat16)


def random_words(seed: int, slice_index: int, numel: int, device: torch.device) -> Tensor:
    """Philox words int64[numel] in [0, 2**32): word ``i % 4`` of the block with counter ``i // 4``, slice index, 0.

    The low half of a word rounds the first moment, the high half the second.
    """
    block = torch.arange(-(-numel // 4), device=device)
    counter = [block & MASK32, block >> 32, torch.full_like(block, slice_index), torch.zeros_like(block)]
    key = [seed & MASK32, seed >> 32 & MASK32]
    for _ in range(PHILOX_ROUNDS):
        first, second = counter[0] * PHILOX_MULTIPLIERS[0], counter[2] * PHILOX_MULTIPLIERS[1]  # wrap at 64 bits
        counter = [
            (second >> 32 & MASK32) ^ counter[1] ^ key[0],
            second & MASK32,
            (first >> 32 & MASK32) ^ counter[3] ^ key[1],
            first & MASK32,
        ]
        key = [(k + increment) & MASK32 for k, increment in zip(key, PHILOX_INCREMENTS, strict=True)]
    return torch.stack(counter, dim=-1).view(-1)[:numel]

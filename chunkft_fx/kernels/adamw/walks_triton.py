# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: N803, SIM300
# (compile-time constants are in capitals)
"""Defines the AdamW kernels for float moments: programs walk over all slices of a table, tile by tile, round robin.

Operands that all lie in the same order are one *run*: whole tiles of it need no mask, so that every access is as
wide as a thread can make it. A weight or gradient cut along a later dimension is walked in two-dimensional *tiles*,
each operand read along its own fast dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl

from chunkft_fx.kernels.adamw.common_triton import (
    COLUMNS,
    EXP_AVG,
    EXP_AVG_SQ,
    FIELDS,
    GRADIENT,
    GRADIENT_STRIDES,
    MASTER,
    ROWS,
    SIZES,
    WEIGHT,
    WEIGHT_STRIDES,
    bfloat16_bits,
    count,
    factors_of,
    master_of,
    pointer,
    random_run,
    random_words,
    stepped,
    store_master,
    widen,
)

# Operands in different orders: a row of a tile of weights and a column of states are whole 128-byte lines.
TILE_ROWS = tl.constexpr(64)
TILE_COLUMNS = tl.constexpr(32)


@triton.jit
def _update(pointers, noise, mask, factors, scale, beta1_rest, beta2, beta2_rest, eps):
    """Load the elements at these pointers, update them, store them."""
    weight, gradient, master, exp_avg, exp_avg_sq = pointers
    # all loads first, so that they are in flight together
    stored = tl.load(weight, mask=mask)
    grad = widen(tl.load(gradient, mask=mask))
    average = widen(tl.load(exp_avg, mask=mask)) if exp_avg is not None else None
    square = widen(tl.load(exp_avg_sq, mask=mask))
    known = tl.load(master, mask=mask) if master is not None else None
    param = master_of(stored, known)
    param, average, square = stepped(param, grad, average, square, factors, scale, beta1_rest, beta2, beta2_rest, eps)
    store_master(weight, master, param, stored, known, mask)
    if noise is not None:
        average, square = bfloat16_bits(average, noise & 0xFFFF), bfloat16_bits(square, noise >> 16)
    if exp_avg is not None:
        tl.store(exp_avg, average, mask=mask)
    tl.store(exp_avg_sq, square, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def adamw_runs(
    table,
    rows,
    lr,
    scale,
    beta1_rest,
    beta2,
    beta2_rest,
    eps,
    WEIGHT_DTYPE: tl.constexpr,
    GRADIENT_DTYPE: tl.constexpr,
    MASTER_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    HAS_EXP_AVG: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """All operands of a slice in one order; only its first size counts."""
    within = tl.arange(0, TILE)
    tile = tl.program_id(0)
    begin = tile.to(tl.int64) * 0
    index = 0
    while index < rows:
        end = tl.load(table + index)
        if tile < end:
            row = table + rows + index * FIELDS
            numel = tl.load(row + SIZES)
            weight = pointer(row, WEIGHT, WEIGHT_DTYPE, ALIGNED)
            gradient = pointer(row, GRADIENT, GRADIENT_DTYPE, ALIGNED)
            master = pointer(row, MASTER, MASTER_DTYPE, ALIGNED) if MASTER_DTYPE is not None else None
            exp_avg = pointer(row, EXP_AVG, STATE_DTYPE, ALIGNED) if HAS_EXP_AVG else None
            exp_avg_sq = pointer(row, EXP_AVG_SQ, STATE_DTYPE, ALIGNED)
            factors = factors_of(row, lr)
            while tile < end:
                start = (tile - begin) * TILE
                pointers = (
                    weight + start + within,
                    gradient + start + within,
                    master + start + within if MASTER_DTYPE is not None else None,
                    exp_avg + start + within if HAS_EXP_AVG else None,
                    exp_avg_sq + start + within,
                )
                noise = random_run(row, start, TILE) if STATE_DTYPE == tl.uint16 else None
                if start + TILE <= numel:
                    _update(pointers, noise, None, factors, scale, beta1_rest, beta2, beta2_rest, eps)
                else:
                    _update(pointers, noise, within < numel - start, factors, scale, beta1_rest, beta2, beta2_rest, eps)
                tile += tl.num_programs(0)
        begin = end
        index += 1


@triton.jit
def _strided(row, field: tl.constexpr, dtype: tl.constexpr, strides: tl.constexpr, place, dim: tl.constexpr, even):
    """Pointers to the elements ``place``, (rows, middle, columns), of an operand that is a run along ``dim``."""
    r, m, c = place
    along_rows = r if dim == ROWS else r * count(row, strides, even)
    along_columns = c if dim == COLUMNS else c * count(row, strides + 2, even)
    return pointer(row, field, dtype, even) + m * count(row, strides + 1, even) + along_rows + along_columns


@triton.jit(do_not_specialize=["rows"])
def adamw_tiles(
    table,
    rows,
    lr,
    scale,
    beta1_rest,
    beta2,
    beta2_rest,
    eps,
    WEIGHT_DTYPE: tl.constexpr,
    GRADIENT_DTYPE: tl.constexpr,
    MASTER_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    HAS_EXP_AVG: tl.constexpr,
    EVEN: tl.constexpr,
    WEIGHT_DIM: tl.constexpr,
    GRADIENT_DIM: tl.constexpr,
):
    """Weights and gradients in any order of (rows, middle, columns); states in that order itself."""
    tile = tl.program_id(0)
    begin = tile.to(tl.int64) * 0
    index = 0
    while index < rows:
        end = tl.load(table + index)
        if tile < end:
            row = table + rows + index * FIELDS
            height = count(row, SIZES, EVEN)
            depth = tl.load(row + SIZES + 1)
            width = count(row, SIZES + 2, EVEN)
            across = tl.cdiv(width, TILE_COLUMNS)
            factors = factors_of(row, lr)
            while tile < end:
                step = tile - begin
                m = step // across % depth
                r = (step // across // depth * TILE_ROWS + tl.arange(0, TILE_ROWS))[:, None]
                c = (step % across * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS))[None, :]
                at = (r * depth + m) * width + c
                pointers = (
                    _strided(row, WEIGHT, WEIGHT_DTYPE, WEIGHT_STRIDES, (r, m, c), WEIGHT_DIM, EVEN),
                    _strided(row, GRADIENT, GRADIENT_DTYPE, GRADIENT_STRIDES, (r, m, c), GRADIENT_DIM, EVEN),
                    pointer(row, MASTER, MASTER_DTYPE, EVEN) + at if MASTER_DTYPE is not None else None,
                    pointer(row, EXP_AVG, STATE_DTYPE, EVEN) + at if HAS_EXP_AVG else None,
                    pointer(row, EXP_AVG_SQ, STATE_DTYPE, EVEN) + at,
                )
                noise = random_words(row, at) if STATE_DTYPE == tl.uint16 else None
                inside = (r < height) & (c < width)
                _update(pointers, noise, inside, factors, scale, beta1_rest, beta2, beta2_rest, eps)
                tile += tl.num_programs(0)
        begin = end
        index += 1

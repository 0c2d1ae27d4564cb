# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: N803
# (compile-time constants are in capitals)
"""Defines the AdamW kernel for 8-bit moments: programs walk over the blocks of all slices, a few at a time.

A program has all elements of a block (`chunkft_fx.kernels.blocks`), and so the largest magnitude among its new
moments, which is the new scale. Weights and gradients may lie in any order; codes, scales and masters lie as the walk
goes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from chunkft_fx.graph.layout import BLOCK_NUMEL
from chunkft_fx.kernels.adamw.common_triton import (
    EXP_AVG,
    EXP_AVG_SCALES,
    EXP_AVG_SQ,
    EXP_AVG_SQ_SCALES,
    FIELDS,
    GRADIENT,
    GRADIENT_STRIDES,
    MASTER,
    ROW,
    SIZES,
    WEIGHT,
    WEIGHT_STRIDES,
    count,
    factors_of,
    master_of,
    pointer,
    stepped,
    store_master,
    widen,
)
from chunkft_fx.kernels.blocks import CODES, LEAST_SCALE

BLOCK = tl.constexpr(BLOCK_NUMEL)
ROW_OF_TABLE = tl.constexpr(CODES)
# The first of the halvings that find one of the codes.
HALF = tl.constexpr(CODES // 2)
HALVINGS = tl.constexpr(CODES.bit_length() - 1)
LEAST = tl.constexpr(LEAST_SCALE)


@triton.jit
def _value(codes, at, scale, values, inside):
    """The float32 that codes stand for, by their block's scale."""
    code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    return tl.load(values + code) * scale[:, None]


@triton.jit
def _store_codes(codes, at, scales, block, value, borders, inside, exists):
    """Store values as codes and scales. What is not a number is larger than any, so that its block shows it."""
    magnitude = tl.where(inside, value, 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(magnitude, axis=1).to(tl.float32, bitcast=True)
    scale = tl.where(largest < LEAST, LEAST, largest)
    share = tl.div_rn(value, tl.broadcast_to(scale[:, None], value.shape))
    code = magnitude * 0
    for halving in tl.static_range(HALVINGS):
        border = tl.load(borders + code + ((HALF >> halving) - 1))
        code += tl.where(share < border, 0, HALF >> halving)
    tl.store(codes + at, code.to(tl.uint8), mask=inside)
    tl.store(scales + block, scale, mask=exists)


@triton.jit
def _places(row, field: tl.constexpr, dtype: tl.constexpr, strides: tl.constexpr, at, is_run: tl.constexpr, even):
    """Pointers to the elements ``at``, counted in the order of the walk."""
    if is_run:
        return pointer(row, field, dtype, even) + at
    depth, width = tl.load(row + SIZES + 1), tl.load(row + SIZES + 2)
    outer = at // width
    first, second, third = outer // depth, outer % depth, at % width
    offset = first * tl.load(row + strides) + second * tl.load(row + strides + 1) + third * tl.load(row + strides + 2)
    return pointer(row, field, dtype, False) + offset


@triton.jit(do_not_specialize=["rows"])
def adamw_blocks(
    table,
    rows,
    code_table,
    lr,
    scale,
    beta1_rest,
    beta2,
    beta2_rest,
    eps,
    WEIGHT_DTYPE: tl.constexpr,
    GRADIENT_DTYPE: tl.constexpr,
    MASTER_DTYPE: tl.constexpr,
    HAS_EXP_AVG: tl.constexpr,
    EVEN: tl.constexpr,
    IS_RUN: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """``code_table`` is `chunkft_fx.kernels.blocks.code_table`; a tile is ``BLOCKS`` blocks."""
    lane = tl.arange(0, BLOCK)[None, :]
    tile = tl.program_id(0)
    begin = tile.to(tl.int64) * 0
    index = 0
    while index < rows:
        end = tl.load(table + index)
        if tile < end:
            row = table + rows + index * FIELDS
            width = count(row, ROW, EVEN)
            across = tl.cdiv(width, BLOCK)
            numel = tl.load(row + SIZES) * tl.load(row + SIZES + 1) * tl.load(row + SIZES + 2)
            blocks = numel // width * across
            codes = pointer(row, EXP_AVG, tl.uint8, EVEN) if HAS_EXP_AVG else None
            scales = pointer(row, EXP_AVG_SCALES, tl.float32, False) if HAS_EXP_AVG else None
            codes_sq = pointer(row, EXP_AVG_SQ, tl.uint8, EVEN)
            scales_sq = pointer(row, EXP_AVG_SQ_SCALES, tl.float32, False)
            master_start = pointer(row, MASTER, MASTER_DTYPE, EVEN) if MASTER_DTYPE is not None else None
            factors = factors_of(row, lr)
            while tile < end:
                block = (tile - begin) * BLOCKS + tl.arange(0, BLOCKS)
                exists = block < blocks
                start = block % across * BLOCK  # within its index
                at = (block // across * width + start)[:, None] + lane
                inside = exists[:, None] & (lane < (width - start)[:, None])
                weight = _places(row, WEIGHT, WEIGHT_DTYPE, WEIGHT_STRIDES, at, IS_RUN, EVEN)
                gradient = _places(row, GRADIENT, GRADIENT_DTYPE, GRADIENT_STRIDES, at, IS_RUN, EVEN)
                master = master_start + at if MASTER_DTYPE is not None else None
                stored = tl.load(weight, mask=inside)
                grad = widen(tl.load(gradient, mask=inside))
                known = tl.load(master, mask=inside) if MASTER_DTYPE is not None else None
                average = None
                if HAS_EXP_AVG:
                    own = tl.load(scales + block, mask=exists, other=0.0)
                    average = _value(codes, at, own, code_table, inside)
                own_sq = tl.load(scales_sq + block, mask=exists, other=0.0)
                square = _value(codes_sq, at, own_sq, code_table + 2 * ROW_OF_TABLE, inside)
                param, average, square = stepped(
                    master_of(stored, known), grad, average, square, factors, scale, beta1_rest, beta2, beta2_rest, eps
                )
                store_master(weight, master, param, stored, known, inside)
                if HAS_EXP_AVG:
                    _store_codes(codes, at, scales, block, average, code_table + ROW_OF_TABLE, inside, exists)
                _store_codes(codes_sq, at, scales_sq, block, square, code_table + 3 * ROW_OF_TABLE, inside, exists)
                tile += tl.num_programs(0)
        begin = end
        index += 1

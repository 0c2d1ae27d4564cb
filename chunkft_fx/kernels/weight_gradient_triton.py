"""Computes the product ``aᵀ b`` of two matrices with many rows, in Triton.

One program computes one tile of the result, over all tokens or (where there are fewer tiles than multiprocessors)
over a part of them. Products of a part go to a place of their own and are summed afterwards, so that a result does
not depend on which program came first.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: N803
# (compile-time constants are in capitals)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def transposed_product(
    a, b, out,  # out: f32[splits, rows, columns], contiguous
    tokens, rows, columns,
    tokens_a_split,  # a multiple of DEPTH
    a_token_stride, a_stride, b_token_stride, b_stride,
    DESCRIBED: tl.constexpr,  # a and b are tensor descriptors; else pointers, and the strides say what lies where
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``out[split] = a[tokens of the split, rows]ᵀ b[the same tokens, columns]``, summed in float32."""
    across = tl.cdiv(columns, COLUMNS)
    # GROUP tiles below each other, then the next column: programs that run together read the same operands
    tile = tl.program_id(0)
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(tl.cdiv(rows, ROWS) - first, GROUP)
    within = tile % (GROUP * across)
    row = (first + within % height) * ROWS
    column = within // height * COLUMNS
    split = tl.program_id(1)
    begin = split * tokens_a_split
    end = tl.minimum(begin + tokens_a_split, tokens)
    i = row + tl.arange(0, ROWS)
    j = column + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if DESCRIBED:
        # what lies outside of a matrix is read as zero
        for token in range(begin, end, DEPTH):
            total = tl.dot(tl.trans(a.load([token, row])), b.load([token, column]), total)
    else:
        t = begin + tl.arange(0, DEPTH)
        a_at = a + t.to(tl.int64)[:, None] * a_token_stride + i.to(tl.int64)[None, :] * a_stride
        b_at = b + t.to(tl.int64)[:, None] * b_token_stride + j.to(tl.int64)[None, :] * b_stride
        for token in range(begin, end, DEPTH):
            left = (tl.arange(0, DEPTH) < end - token)[:, None]
            a_tile = tl.load(a_at, mask=left & (i < rows)[None, :], other=0.0)
            b_tile = tl.load(b_at, mask=left & (j < columns)[None, :], other=0.0)
            total = tl.dot(tl.trans(a_tile), b_tile, total)
            a_at += DEPTH * a_token_stride
            b_at += DEPTH * b_token_stride
    place = out + (split.to(tl.int64) * rows + i.to(tl.int64)[:, None]) * columns + j[None, :]
    tl.store(place, total, mask=(i < rows)[:, None] & (j < columns)[None, :])

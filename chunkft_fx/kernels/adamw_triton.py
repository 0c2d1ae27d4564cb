# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: N803, SIM102, SIM300, RET505
# (compile-time constants are in capitals; Triton compiles one branch of an if, but not what follows a return)
"""Defines the AdamW kernels: a fixed number of programs walks over all slices of a table, tile by tile, round robin.

Operands that all lie in the same order are one *run*: whole tiles of it need no mask, so that every access is as
wide as a thread can make it. A weight or gradient cut along a later dimension is walked in two-dimensional *tiles*,
each operand read along its own fast dimension.

The arithmetic is that of torch's functional AdamW, each operation rounded by itself: nothing is contracted to a fused
multiply-add (torch contracts some, depending on the processor), division and root are correctly rounded, denormals
are kept, and what torch computes in Python floats is computed in float64. bfloat16 is loaded and stored as its bits,
so that rounding is the kernel's own. The result is therefore the same on every GPU, and in Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Operands in different orders: a row of a tile of weights and a column of states are whole 128-byte lines.
TILE_ROWS = tl.constexpr(64)
TILE_COLUMNS = tl.constexpr(32)
# Sizes and strides (in elements) that are multiples of this keep every row of a tile as aligned as its first.
DIVISOR = tl.constexpr(16)

# The table: by row the number of tiles up to its end, then the rows.
# Their fields, in the order in which `chunkft_fx.kernels.adamw` writes them.
# Sizes and strides are those of (rows, middle, columns).
SIZES = tl.constexpr(0)
WEIGHT = tl.constexpr(3)
GRADIENT = tl.constexpr(4)
MASTER = tl.constexpr(5)
EXP_AVG = tl.constexpr(6)
EXP_AVG_SQ = tl.constexpr(7)
WEIGHT_STRIDES = tl.constexpr(8)
GRADIENT_STRIDES = tl.constexpr(11)
LR = tl.constexpr(14)
WEIGHT_DECAY = tl.constexpr(15)
FIRST_CORRECTION = tl.constexpr(16)
SECOND_CORRECTION = tl.constexpr(17)
SLICE_INDEX = tl.constexpr(18)
SEED = tl.constexpr(19)
FIELDS = tl.constexpr(20)

# The dimension along which an operand is one run of memory.
NO_DIM = tl.constexpr(0)
ROWS = tl.constexpr(1)
COLUMNS = tl.constexpr(2)


@triton.jit
def _widen(value):
    """float32 of a loaded value; uint16 holds the bits of a bfloat16."""
    if value.dtype == tl.uint16:
        return (value.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def _bfloat16_bits(value, noise):
    """The upper half of a float32's bits after ``noise`` was added to them; infinities and NaN stay what they are."""
    bits = value.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7FFFFFFF) < 0x7F800000
    kept = tl.where(value == value, tl.where(finite, bits + noise, bits), 0x7FC00000)
    return (kept >> 16).to(tl.uint16)


@triton.jit
def _round_to_nearest(value, pointee: tl.constexpr):
    """A float32 as ``pointee`` stores it; ties go to even."""
    if pointee == tl.uint16:
        last_kept = (value.to(tl.uint32, bitcast=True) >> 16) & 1
        return _bfloat16_bits(value, last_kept + 0x7FFF)
    else:
        return value.to(pointee)


@triton.jit
def _join_master(weight, remainder):
    """As `masters.join_master`, of a weight's bits."""
    bits = weight.to(tl.int32)
    magnitude = (bits & 0x7FFF) << 16
    moved = magnitude + remainder.to(tl.int32)
    moved = tl.where((moved >= 0) & (moved <= 0x7F800000), moved, magnitude)
    return (moved | ((bits >> 15) << 31)).to(tl.float32, bitcast=True)


@triton.jit
def _split_master(master):
    """As `masters.split_master`, the weight as its bits."""
    bits = tl.where(master == master, master.to(tl.uint32, bitcast=True), 0x7FC00000)
    return ((bits + 0x8000) >> 16).to(tl.uint16), bits.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def _pointer(row, field: tl.constexpr, pointee: tl.constexpr, aligned: tl.constexpr):
    pointer = tl.load(row + field).to(tl.pointer_type(pointee))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _count(row, field: tl.constexpr, aligned: tl.constexpr):
    """A size or stride."""
    count = tl.load(row + field)
    if aligned:
        count = tl.multiple_of(count, DIVISOR)
    return count


@triton.jit
def _float64(row, field: tl.constexpr):
    return tl.load(row + field).to(tl.float64, bitcast=True)


@triton.jit
def _random_block(row, block):
    """The four words of Philox blocks, as `adamw_reference.random_words` numbers them."""
    low = block.to(tl.uint32)
    index = tl.load(row + SLICE_INDEX).to(tl.uint32)
    return tl.philox(tl.load(row + SEED), low, (block >> 32).to(tl.uint32), low * 0 + index, low * 0)


@triton.jit
def _random_words(row, element):
    """One word for each element, wherever it is."""
    first, second, third, fourth = _random_block(row, element // 4)
    word = element % 4
    return tl.where(word < 2, tl.where(word == 0, first, second), tl.where(word == 2, third, fourth))


@triton.jit
def _random_run(row, start, numel: tl.constexpr):
    """The words of ``numel`` elements from ``start``, a multiple of 4: each block is made once."""
    first, second, third, fourth = _random_block(row, start // 4 + tl.arange(0, numel // 4))
    return tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))


@triton.jit
def _factors(row, lr):
    """What the weight keeps under decay, the step size, and the root of the second moment's bias correction."""
    rate = _float64(row, LR) if lr is None else tl.load(lr).to(tl.float64)
    kept = (1 - rate * _float64(row, WEIGHT_DECAY)).to(tl.float32)
    step_size = (rate / _float64(row, FIRST_CORRECTION)).to(tl.float32)
    return kept, step_size, _float64(row, SECOND_CORRECTION).to(tl.float32)


@triton.jit
def _update(pointers, noise, mask, factors, scale, beta1_rest, beta2, beta2_rest, eps):
    """Load the elements at these pointers, update them, store them."""
    weight, gradient, master, exp_avg, exp_avg_sq = pointers
    kept, step_size, correction = factors
    # all loads first, so that they are in flight together
    stored = tl.load(weight, mask=mask)
    grad = _widen(tl.load(gradient, mask=mask))
    average = _widen(tl.load(exp_avg, mask=mask)) if exp_avg is not None else None
    square = _widen(tl.load(exp_avg_sq, mask=mask))
    param = _widen(stored)
    known = tl.load(master, mask=mask) if master is not None else None
    if known is not None:
        if known.dtype == tl.int16:
            param = _join_master(stored, known)
        else:
            param = tl.where(_widen(_round_to_nearest(known, stored.dtype)) == param, known, param)
    if scale is not None:
        grad = grad * tl.load(scale).to(tl.float32)
    param = param * kept
    if average is None:
        average = grad
    else:
        # torch.lerp has one formula for weights below one half and one for those above
        change = grad - average
        near = average + beta1_rest * change
        far = grad - change * (1 - beta1_rest)
        average = tl.where(beta1_rest < 0.5, near, far)
    square = square * beta2 + beta2_rest * grad * grad
    denominator = tl.div_rn(tl.sqrt_rn(square), correction) + eps
    param = param - tl.div_rn(step_size * average, denominator)
    rounded, kept_master = _round_to_nearest(param, stored.dtype), param
    if known is not None:
        if known.dtype == tl.int16:
            rounded, kept_master = _split_master(param)
    tl.store(weight, rounded, mask=mask)
    if master is not None:
        tl.store(master, kept_master, mask=mask)
    if noise is not None:
        average, square = _bfloat16_bits(average, noise & 0xFFFF), _bfloat16_bits(square, noise >> 16)
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
            weight = _pointer(row, WEIGHT, WEIGHT_DTYPE, ALIGNED)
            gradient = _pointer(row, GRADIENT, GRADIENT_DTYPE, ALIGNED)
            master = _pointer(row, MASTER, MASTER_DTYPE, ALIGNED) if MASTER_DTYPE is not None else None
            exp_avg = _pointer(row, EXP_AVG, STATE_DTYPE, ALIGNED) if HAS_EXP_AVG else None
            exp_avg_sq = _pointer(row, EXP_AVG_SQ, STATE_DTYPE, ALIGNED)
            factors = _factors(row, lr)
            while tile < end:
                start = (tile - begin) * TILE
                pointers = (
                    weight + start + within,
                    gradient + start + within,
                    master + start + within if MASTER_DTYPE is not None else None,
                    exp_avg + start + within if HAS_EXP_AVG else None,
                    exp_avg_sq + start + within,
                )
                noise = _random_run(row, start, TILE) if STATE_DTYPE == tl.uint16 else None
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
    along_rows = r if dim == ROWS else r * _count(row, strides, even)
    along_columns = c if dim == COLUMNS else c * _count(row, strides + 2, even)
    return _pointer(row, field, dtype, even) + m * _count(row, strides + 1, even) + along_rows + along_columns


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
            height = _count(row, SIZES, EVEN)
            depth = tl.load(row + SIZES + 1)
            width = _count(row, SIZES + 2, EVEN)
            across = tl.cdiv(width, TILE_COLUMNS)
            factors = _factors(row, lr)
            while tile < end:
                step = tile - begin
                m = step // across % depth
                r = (step // across // depth * TILE_ROWS + tl.arange(0, TILE_ROWS))[:, None]
                c = (step % across * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS))[None, :]
                at = (r * depth + m) * width + c
                pointers = (
                    _strided(row, WEIGHT, WEIGHT_DTYPE, WEIGHT_STRIDES, (r, m, c), WEIGHT_DIM, EVEN),
                    _strided(row, GRADIENT, GRADIENT_DTYPE, GRADIENT_STRIDES, (r, m, c), GRADIENT_DIM, EVEN),
                    _pointer(row, MASTER, MASTER_DTYPE, EVEN) + at if MASTER_DTYPE is not None else None,
                    _pointer(row, EXP_AVG, STATE_DTYPE, EVEN) + at if HAS_EXP_AVG else None,
                    _pointer(row, EXP_AVG_SQ, STATE_DTYPE, EVEN) + at,
                )
                noise = _random_words(row, at) if STATE_DTYPE == tl.uint16 else None
                inside = (r < height) & (c < width)
                _update(pointers, noise, inside, factors, scale, beta1_rest, beta2, beta2_rest, eps)
                tile += tl.num_programs(0)
        begin = end
        index += 1

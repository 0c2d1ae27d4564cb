# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: SIM102, RET505
# (Triton compiles one branch of an if, but not what follows a return)
"""Defines what the AdamW kernels share: the fields of their table, the formats of numbers, and the arithmetic.

The arithmetic is that of torch's functional AdamW, each operation rounded by itself: nothing is contracted to a fused
multiply-add (torch contracts some, depending on the processor), division and root are correctly rounded, denormals
are kept, and what torch computes in Python floats is computed in float64. bfloat16 is loaded and stored as its bits,
so that rounding is the kernel's own. The result is therefore the same on every GPU, and in Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes and strides (in elements) that are multiples of this keep every row of a tile as aligned as its first.
DIVISOR = tl.constexpr(16)

# The table: by row the number of tiles up to its end, then the rows.
# Their fields, in the order in which `chunkft_fx.kernels.adamw.table` writes them.
# Sizes and strides are those of (rows, middle, columns); ``ROW`` is the elements of one index of the cut dimension.
SIZES = tl.constexpr(0)
WEIGHT = tl.constexpr(3)
GRADIENT = tl.constexpr(4)
MASTER = tl.constexpr(5)
EXP_AVG = tl.constexpr(6)
EXP_AVG_SQ = tl.constexpr(7)
EXP_AVG_SCALES = tl.constexpr(8)
EXP_AVG_SQ_SCALES = tl.constexpr(9)
ROW = tl.constexpr(10)
WEIGHT_STRIDES = tl.constexpr(11)
GRADIENT_STRIDES = tl.constexpr(14)
LR = tl.constexpr(17)
WEIGHT_DECAY = tl.constexpr(18)
FIRST_CORRECTION = tl.constexpr(19)
SECOND_CORRECTION = tl.constexpr(20)
SLICE_INDEX = tl.constexpr(21)
SEED = tl.constexpr(22)
FIELDS = tl.constexpr(23)

# The dimension along which an operand is one run of memory.
NO_DIM = tl.constexpr(0)
ROWS = tl.constexpr(1)
COLUMNS = tl.constexpr(2)


@triton.jit
def widen(value):
    """float32 of a loaded value; uint16 holds the bits of a bfloat16."""
    if value.dtype == tl.uint16:
        return (value.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def bfloat16_bits(value, noise):
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
        return bfloat16_bits(value, last_kept + 0x7FFF)
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
def pointer(row, field: tl.constexpr, pointee: tl.constexpr, aligned: tl.constexpr):
    found = tl.load(row + field).to(tl.pointer_type(pointee))
    if aligned:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def count(row, field: tl.constexpr, aligned: tl.constexpr):
    """A size or stride."""
    found = tl.load(row + field)
    if aligned:
        found = tl.multiple_of(found, DIVISOR)
    return found


@triton.jit
def _float64(row, field: tl.constexpr):
    return tl.load(row + field).to(tl.float64, bitcast=True)


@triton.jit
def _random_block(row, block):
    """The four words of Philox blocks, as `reference.random_words` numbers them."""
    low = block.to(tl.uint32)
    index = tl.load(row + SLICE_INDEX).to(tl.uint32)
    return tl.philox(tl.load(row + SEED), low, (block >> 32).to(tl.uint32), low * 0 + index, low * 0)


@triton.jit
def random_words(row, element):
    """One word for each element, wherever it is."""
    first, second, third, fourth = _random_block(row, element // 4)
    word = element % 4
    return tl.where(word < 2, tl.where(word == 0, first, second), tl.where(word == 2, third, fourth))


@triton.jit
def random_run(row, start, numel: tl.constexpr):
    """The words of ``numel`` elements from ``start``, a multiple of 4: each block is made once."""
    first, second, third, fourth = _random_block(row, start // 4 + tl.arange(0, numel // 4))
    return tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))


@triton.jit
def factors_of(row, lr):
    """What the weight keeps under decay, the step size, and the root of the second moment's bias correction."""
    rate = _float64(row, LR) if lr is None else tl.load(lr).to(tl.float64)
    kept = (1 - rate * _float64(row, WEIGHT_DECAY)).to(tl.float32)
    step_size = (rate / _float64(row, FIRST_CORRECTION)).to(tl.float32)
    return kept, step_size, _float64(row, SECOND_CORRECTION).to(tl.float32)


@triton.jit
def master_of(stored, known):
    """The float32 master of loaded weights, beside what is kept of it (None: they are their own)."""
    param = widen(stored)
    if known is not None:
        if known.dtype == tl.int16:
            param = _join_master(stored, known)
        else:
            param = tl.where(widen(_round_to_nearest(known, stored.dtype)) == param, known, param)
    return param


@triton.jit
def stepped(param, grad, average, square, factors, scale, beta1_rest, beta2, beta2_rest, eps):
    """Masters and moments after a step; ``average`` is None where there is no first moment."""
    kept, step_size, correction = factors
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
    return param - tl.div_rn(step_size * average, denominator), average, square


@triton.jit
def store_master(weight, master, param, stored, known, mask):
    """Store a master as weight and what is kept of it, in the formats of those loaded."""
    rounded, kept_master = _round_to_nearest(param, stored.dtype), param
    if known is not None:
        if known.dtype == tl.int16:
            rounded, kept_master = _split_master(param)
    tl.store(weight, rounded, mask=mask)
    if master is not None:
        tl.store(master, kept_master, mask=mask)

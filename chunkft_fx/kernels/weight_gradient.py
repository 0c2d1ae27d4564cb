"""Computes the gradient of a slice of a weight: ``dW[s:s+l] = dY[:, s:s+l]ᵀ X``, or ``dW[:, s:s+l] = dYᵀ X[:, s:s+l]``.

The operator ``chunkft_fx::weight_gradient(dy, x, start, dim, length, by) -> Tensor`` reads the columns of the slice
where they are, sums in float32 and returns float32. What it replaces makes a contiguous copy of the columns first,
rounds the product to the operands' dtype, and is widened again where gradients are added up.

``by`` says who computes it: one of `TILINGS` is a Triton kernel, `LIBRARY` the library's matrix product on strided
operands. `chunkft_fx.machine.kernel_choice` measures which is fastest, `passes.lower_triton` writes it into the graph.
On the CPU, and for float32 and float64, it is always the library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import register_flop_formula

from chunkft_fx.errors import OptionError
from chunkft_fx.graph.layout import wide_dtype
from chunkft_fx.graph.sizes import AS_TRACED, Sizes
from chunkft_fx.kernels.launch import ACCESS_NBYTES, current_device

LIBRARY = "library"
# What the kernel multiplies; its sums are float32.
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
# Tokens are split only into parts of at least this many: below, sums of the parts take longer than they save.
LEAST_TOKENS_A_SPLIT = 512
# The first generation with tensor descriptors (Hopper).
_DESCRIPTORS_SINCE = 9


@dataclass(frozen=True)
class Problem:
    """All that the cost of a weight gradient depends on; ``dim`` says which of ``rows`` and ``columns`` is cut."""

    tokens: int
    rows: int
    columns: int
    dim: int
    dtype: torch.dtype


# Who computes a weight gradient (`chunkft_fx.machine.kernel_choice`); None: the library's matrix product, as traced.
Choose = Callable[[Problem], str | None]


@dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up: a tile of the result, the tokens of one step, and tiles that share operands."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    group: int = 8

    def splits(self, tokens: int, rows: int, columns: int, processors: int) -> int:
        """Into how many parts tokens are split, so that few tiles still occupy all multiprocessors."""
        tiles = self.tiles(rows, columns)
        most = tokens // max(LEAST_TOKENS_A_SPLIT, self.depth)
        return max(1, min(processors // max(tiles, 1), most))

    def tiles(self, rows: int, columns: int) -> int:
        """The number of tiles of a result of these rows and columns."""
        return -(-rows // self.rows) * -(-columns // self.columns)


# The stages fill the 227 KiB of shared memory that a program of an H100 can have: four of 48 KiB, one program on a
# multiprocessor, or three of 32 KiB, two programs.
TILINGS = {
    "128x256": Tiling(128, 256, 64, num_warps=8, num_stages=4),
    "256x128": Tiling(256, 128, 64, num_warps=8, num_stages=4),
    "128x128": Tiling(128, 128, 64, num_warps=8, num_stages=3),
}


def compute(dy: Tensor, x: Tensor, start: Tensor, dim: int, length: int, by: str) -> Tensor:
    """The gradient of ``length`` rows (``dim`` 0) or columns (``dim`` 1) of a weight ``[out, in]`` from ``start``.

    ``dy`` is ``[tokens, out]``, ``x`` ``[tokens, in]``, of one dtype and with any strides; ``start`` is an
    ``i64[]`` on the CPU. The result is ``f32[length, in]`` or ``f32[out, length]`` (float64 for float64).
    Raises `OptionError` for operands that do not match, and for a ``by`` that is not known.
    """
    _check(dy, x, dim, by)
    first = int(start)
    a = dy.narrow(1, first, length) if dim == 0 else dy
    b = x.narrow(1, first, length) if dim == 1 else x
    if by == LIBRARY or not has_kernel(a.device, a.dtype):
        return reference(a, b)
    return launch(a, b, TILINGS[by])


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernel serves operands of this device and dtype."""
    return device.type == "cuda" and dtype in KERNEL_DTYPES


def reference(a: Tensor, b: Tensor) -> Tensor:
    """``aᵀ b`` by the library's product, summed and returned in the wide dtype."""
    wide = wide_dtype(a.dtype)
    if a.dtype == wide:
        return torch.mm(a.t(), b)
    if a.is_cuda:
        return torch.mm(a.t(), b, out_dtype=wide)
    return torch.mm(a.to(wide).t(), b.to(wide))


def launch(a: Tensor, b: Tensor, tiling: Tiling, described: bool | None = None) -> Tensor:
    """Run the kernel: ``a`` ``[tokens, rows]`` and ``b`` ``[tokens, columns]`` give ``f32[rows, columns]``.

    ``described`` says whether operands are read by tensor descriptors; None where the device and strides allow.
    """
    (tokens, rows), columns = a.shape, b.shape[1]
    if not tokens or not rows or not columns:
        return a.new_zeros((rows, columns), dtype=torch.float32)
    from chunkft_fx.kernels.weight_gradient_triton import transposed_product

    splits = tiling.splits(tokens, rows, columns, _processors(a.device))
    steps = -(-tokens // (splits * tiling.depth))
    out = a.new_empty((splits, rows, columns), dtype=torch.float32)
    if described is None:
        described = _has_descriptors(a.device) and _is_describable(a) and _is_describable(b)
    with current_device(a.device):
        transposed_product[(tiling.tiles(rows, columns), splits)](
            _described(a, tiling.depth, tiling.rows) if described else a,
            _described(b, tiling.depth, tiling.columns) if described else b,
            out,
            tokens,
            rows,
            columns,
            steps * tiling.depth,
            *a.stride(),
            *b.stride(),
            DESCRIBED=described,
            ROWS=tiling.rows,
            COLUMNS=tiling.columns,
            DEPTH=tiling.depth,
            GROUP=tiling.group,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )
    return out[0] if splits == 1 else out.sum(0)


def workspace(node: fx.Node, sizes: Sizes = AS_TRACED) -> int:
    """Bytes that a node of the operator allocates beyond its result: sums of split tokens; 0 for any other node."""
    if node.target is not weight_gradient:
        return 0
    args: Any = fx.map_arg(node.args, lambda n: n.meta["val"])
    dy, x, _, dim, length, by = args
    tokens, out, features = (sizes.of(s) for s in (*dy.shape, x.shape[1]))
    rows, columns = (length, features) if dim == 0 else (out, length)
    wide = wide_dtype(dy.dtype)
    if by != LIBRARY and has_kernel(dy.device, dy.dtype):
        splits = TILINGS[by].splits(tokens, rows, columns, _processors(dy.device))
        return splits * rows * columns * wide.itemsize if splits > 1 else 0
    # on the CPU both operands are widened
    return 0 if dy.is_cuda or dy.dtype == wide else tokens * (rows + columns) * wide.itemsize


def _processors(device: torch.device) -> int:
    # off a GPU, which is in the interpreter: enough to split small problems
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def _has_descriptors(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= _DESCRIPTORS_SINCE


def _is_describable(t: Tensor) -> bool:
    """Whether rows are contiguous and all begin at a multiple of 16 bytes."""
    places = (t.data_ptr(), t.stride(0) * t.element_size())
    return t.stride(1) == 1 and all(p % ACCESS_NBYTES == 0 for p in places)


def _described(t: Tensor, depth: int, width: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(t.shape), list(t.stride()), [depth, width])


def _check(dy: Tensor, x: Tensor, dim: int, by: str) -> None:
    if dy.ndim != 2 or x.ndim != 2 or dy.shape[0] != x.shape[0] or dy.dtype != x.dtype:
        raise OptionError(
            f"dy is {dy.dtype}{list(dy.shape)} and x is {x.dtype}{list(x.shape)}; "
            "both must be matrices of one dtype with a row for each token"
        )
    if dim not in (0, 1):
        raise OptionError(f"dim is {dim}; a weight is cut along 0 or 1")
    if by != LIBRARY and by not in TILINGS:
        raise OptionError(f"by={by!r} is not known; choose one of {', '.join((LIBRARY, *TILINGS))}")


def _meta(dy: Tensor, x: Tensor, start: Tensor, dim: int, length: int, by: str) -> Tensor:
    _check(dy, x, dim, by)
    sizes = (length, x.shape[1]) if dim == 0 else (dy.shape[1], length)
    return dy.new_empty(sizes, dtype=wide_dtype(dy.dtype))


_LIBRARY = torch.library.Library("chunkft_fx", "FRAGMENT")
_LIBRARY.define(
    "weight_gradient(Tensor dy, Tensor x, Tensor start, int dim, SymInt length, str by) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("weight_gradient", compute, "CPU")
_LIBRARY.impl("weight_gradient", compute, "CUDA")
torch.library.register_fake("chunkft_fx::weight_gradient", _meta, lib=_LIBRARY)

weight_gradient = torch.ops.chunkft_fx.weight_gradient.default


def _flops(dy: Sequence[int], x: Sequence[int], start: Any, dim: int, length: int, *args: Any, **kwargs: Any) -> int:
    return 2 * dy[0] * length * (x[1] if dim == 0 else dy[1])


register_flop_formula(torch.ops.chunkft_fx.weight_gradient)(_flops)

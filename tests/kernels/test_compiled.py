"""The AdamW kernels compiled for a GPU that need not be there: what the interpreter takes, the compiler may not."""

from __future__ import annotations

import os
from typing import Any

import pytest

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled then")

# By kernel: its compile-time constants, the formats of a bfloat16 weight with a remainder or of a float32 one.
WIDE: dict[str, Any] = {"WEIGHT_DTYPE": "float32", "GRADIENT_DTYPE": "float32", "MASTER_DTYPE": None}
NARROW: dict[str, Any] = {"WEIGHT_DTYPE": "uint16", "GRADIENT_DTYPE": "uint16", "MASTER_DTYPE": "int16"}
BLOCKS: dict[str, Any] = {"HAS_EXP_AVG": True, "EVEN": True, "IS_RUN": True, "BLOCKS": 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "blocks": ("adamw_blocks", NARROW | BLOCKS),
    "blocks in another order": (
        "adamw_blocks",
        WIDE | BLOCKS | {"EVEN": False, "IS_RUN": False, "HAS_EXP_AVG": False, "lr": None, "scale": None},
    ),
    "runs": ("adamw_runs", NARROW | {"STATE_DTYPE": "uint16", "HAS_EXP_AVG": True, "ALIGNED": True, "TILE": 1024}),
    "tiles": (
        "adamw_tiles",
        WIDE | {"STATE_DTYPE": "float32", "HAS_EXP_AVG": False, "EVEN": True, "WEIGHT_DIM": 2, "GRADIENT_DIM": 1},
    ),
}
ARGUMENTS = {"table": "*i64", "rows": "i32", "code_table": "*fp32", "lr": "*fp32", "scale": "*fp32"} | dict.fromkeys(
    ("beta1_rest", "beta2", "beta2_rest", "eps"), "fp32"
)


@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_and_contract_nothing(case: str) -> None:
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from chunkft_fx.kernels.adamw import blocks_triton, walks_triton

    name, given = CASES[case]
    kernel = getattr(blocks_triton if name == "adamw_blocks" else walks_triton, name)
    constants = {key: getattr(tl, v) if isinstance(v, str) else v for key, v in given.items()}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else ARGUMENTS[n] for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    options = {"num_warps": 8, "enable_fp_fusion": False, "enable_reflect_ftz": False}
    assembly = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert "div.rn.f32" in assembly and "sqrt.rn.f32" in assembly
    assert "fma" not in assembly and ".ftz" not in assembly
    if case == "blocks":  # four codes at once
        assert assembly.count("st.global.b8") == 0

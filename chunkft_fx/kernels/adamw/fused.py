"""Runs AdamW over many slices in one pass: reconcile, decay, moments, step, and the weight's rounded copy.

On CUDA a Triton kernel reads and writes each operand once, wherever it is: master weights and moments may be
staged on the device or stay in pinned host memory, which the kernel reaches over the link. On the CPU, and for
float64, the reference does the same with torch's own operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chunkft_fx.errors import OptionError
from chunkft_fx.kernels.adamw.reference import SliceUpdate, adamw_reference, check_operands, require_one_device
from chunkft_fx.kernels.adamw.table import Variant, blocks_in_tile, groups_of, numbers_of
from chunkft_fx.kernels.blocks import code_table
from chunkft_fx.kernels.launch import LaunchOptions, current_device, device_table, require_reachable

__all__ = ["SliceUpdate", "adamw", "launch_adamw"]


def adamw(
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
    """Update all slices in place by one step of AdamW (Loshchilov and Hutter, arXiv 1711.05101).

    A master whose rounded value is not the weight takes the weight's value first: it is new, or the weight was
    changed from outside; a remainder is that of whatever weight there is. ``lr`` and ``scale`` (0-d; gradients are
    multiplied by it) may be device tensors, which are read on the device. bfloat16 moments are rounded stochastically,
    for which ``seed`` must differ from step to step, those in 8 bits to the nearest code. The kernel runs on the
    current stream: pinned tensors must live, and stay unread, until it has finished.
    With float32 moments its weights are those of torch's functional AdamW to 1 ulp, where the step is small beside
    the weight (a larger one shows the last bits of the moments, which torch rounds as the processor has it).

    Raises `OptionError` for operands that do not match, and for memory that the kernel cannot reach.
    """
    for u in updates:
        if u.step < 1:
            raise OptionError(f"step is {u.step}; it counts this update too, so it is 1 or more")
        if u.exp_avg is None and beta1 != 0:
            raise OptionError(f"exp_avg is missing; only beta1=0 needs none, and beta1 is {beta1}")
    filled = [u for u in updates if u.weight.numel() or u.gradient.numel()]
    options: dict[str, Any] = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    options |= {"scale": scale, "seed": seed}
    fused = [u for u in filled if u.gradient.is_cuda and u.gradient.dtype != torch.float64]
    plain = [u for u in filled if not u.gradient.is_cuda or u.gradient.dtype == torch.float64]
    for u in plain:
        check_operands(u)
        require_one_device(u)
    if fused:
        launch_adamw(fused, **options)
    if plain:
        adamw_reference(plain, **options)


def launch_adamw(
    updates: Sequence[SliceUpdate],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: Tensor | None = None,
    seed: int = 0,
    launch: LaunchOptions | None = None,
) -> None:
    """Run the kernel on updates with elements, all with gradients on one device: a launch for each layout.

    Raises `OptionError` as `adamw` does.
    """
    device = updates[0].gradient.device
    if isinstance(lr, Tensor) and lr.device.type == "cpu":
        lr = float(lr)
    on_device = {"lr": lr if isinstance(lr, Tensor) else None, "scale": scale}
    for name, scalar in on_device.items():
        if scalar is not None:
            require_reachable(scalar, device, name)
    host_lr = 0.0 if isinstance(lr, Tensor) else float(lr)
    launch = launch or LaunchOptions()
    steps = np.array([u.step for u in updates])
    for group in groups_of(updates, launch):
        numbers = numbers_of(group, steps[group.indices], host_lr, beta1, beta2, weight_decay, seed)
        kernel, constants = _kernel(group.variant, launch, device)
        with current_device(device):
            kernel[(launch.programs(int(group.ends[-1]), device, group.on_host),)](
                device_table(np.concatenate([group.ends, numbers.reshape(-1)]), device),
                len(group.ends),
                **on_device,
                beta1_rest=float(1 - beta1),
                beta2=float(beta2),
                beta2_rest=float(1 - beta2),
                eps=float(eps),
                **constants,
                num_warps=launch.num_warps,
                enable_fp_fusion=False,
                enable_reflect_ftz=False,
            )


def _kernel(variant: Variant, launch: LaunchOptions, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The kernel of a variant, and the arguments that it alone has: compile-time constants, and the map of codes."""
    import triton.language as tl

    from chunkft_fx.kernels.adamw import blocks_triton, walks_triton

    pointees = {
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.uint16,
        torch.int16: tl.int16,
        None: None,
    }
    constants = {
        "WEIGHT_DTYPE": pointees[variant.weight_dtype],
        "GRADIENT_DTYPE": pointees[variant.gradient_dtype],
        "MASTER_DTYPE": pointees[variant.master_dtype],
        "HAS_EXP_AVG": variant.has_exp_avg,
    }
    if variant.in_blocks:
        own = {"code_table": code_table(device), "EVEN": variant.even, "IS_RUN": variant.is_run}
        return blocks_triton.adamw_blocks, constants | own | {"BLOCKS": blocks_in_tile(launch)}
    constants["STATE_DTYPE"] = pointees[variant.state_dtype]
    if variant.is_run:
        return walks_triton.adamw_runs, constants | {"ALIGNED": variant.even, "TILE": launch.tile}
    names = ("WEIGHT_DIM", "GRADIENT_DIM")
    dims = dict(zip(names, variant.dims, strict=True))
    return walks_triton.adamw_tiles, constants | {"EVEN": variant.even} | dims

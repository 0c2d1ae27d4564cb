"""Optimizers with moments in 8 bits over `block_net`, their sweeps, and comparisons of what they keep."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn

from chunkft_fx.graph.layout import front
from chunkft_fx.kernels.blocks import dequantised
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.optim.rules.adamw import AdamW
from tests.support.block_net import block_batch, block_compiled, block_net, feed_sweep

BF16 = torch.bfloat16
OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
# By name, and whether they can be below zero.
MOMENTS = (("exp_avg", True), ("exp_avg_sq", False))


def made(
    dtype: torch.dtype = BF16, chunks: int = 3, seed: int = 0, state_dtype: str = "8bit", **options: Any
) -> tuple[CompiledModule, AdamW]:
    module = block_compiled(block_net(dtype, seed), chunks=chunks)
    return module, AdamW(module, state_dtype=state_dtype, **(OPTIONS | options))


def sweeps(module: CompiledModule, optimizer: AdamW, which: range) -> None:
    """Whole sweeps in which an element has the same gradients whatever the chunks."""
    chunks = len(module.plan.chunks)
    for sweep in which:
        for _ in range(chunks):
            feed_sweep(module, sweep)
            optimizer.step()


def trained(module: CompiledModule, optimizer: torch.optim.Optimizer, steps: range, dtype: torch.dtype = BF16) -> None:
    for step in steps:
        optimizer.zero_grad()
        module(block_batch(step, dtype)).backward()
        optimizer.step()


def through_a_file(checkpoint: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(checkpoint, file)
    loaded: dict[str, Any] = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    return loaded


def assert_same_states(a: dict[str, Any], b: dict[str, Any]) -> None:
    """The states of two checkpoints to the bit."""
    assert a["state"].keys() == b["state"].keys()
    for i, state in a["state"].items():
        assert state.keys() == b["state"][i].keys()
        for key, value in state.items():
            other = b["state"][i][key]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, (i, key)


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


def floats(state: dict[str, Tensor], name: str, signed: bool, dim: int) -> Tensor:
    """A saved moment as float32, in whichever format it is."""
    if name in state:
        return state[name].float()
    codes = front(state[f"{name}_codes"], dim)
    return dequantised(codes, state[f"{name}_scales"], signed).movedim(0, dim)

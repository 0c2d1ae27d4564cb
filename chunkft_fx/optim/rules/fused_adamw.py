"""Runs AdamW on the active slices: from weights, gradients and staged states to calls of the AdamW kernel.

On CUDA the kernel reads and writes each operand once, a streamed weight in pinned host memory too. Without Triton,
and where the kernel cannot walk a weight, the weight is copied to the device for the update, and back.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from chunkft_fx.graph.layout import front
from chunkft_fx.kernels.adamw.fused import SliceUpdate, adamw
from chunkft_fx.kernels.adamw.reference import adamw_reference
from chunkft_fx.kernels.launch import join_dims
from chunkft_fx.optim.states.step_counts import within
from chunkft_fx.optim.update import StagedSlice
from chunkft_fx.plan.state_spec import CODES, MASTER, REMAINDER, SCALES

# Dimensions in which the kernel walks weight and gradient together.
KERNEL_DIMS = 3


class AdamWUpdate:
    """One step of AdamW for one parameter group's slices: all memory is taken when it is made, `apply` does it.

    The slices all have gradients, on one device. ``options`` are the group's; gradients count times ``scale`` (0-d, on
    their device); ``seed`` is for stochastic rounding, and differs from call to call. A slice in which step counts
    differ is updated run by run.
    """

    def __init__(
        self, entries: Sequence[StagedSlice], options: Mapping[str, Any], scale: Tensor | None, seed: int
    ) -> None:
        self._updates: list[SliceUpdate] = []
        self._copied: list[tuple[Tensor, Tensor]] = []  # where a weight belongs, and its copy, which is updated
        self._parameters = [entry.parameter for entry in entries]
        self._options, self._scale, self._seed = options, scale, seed
        for entry in entries:
            self._add(entry)

    def _add(self, entry: StagedSlice) -> None:
        s = entry.slice
        home, gradient = front(entry.weight, s.dim), front(entry.gradient, s.dim)
        weight = home
        if not _is_in_reach(home, gradient):
            gradient = gradient.contiguous()
            weight = home.to(gradient.device).contiguous()
            self._copied.append((home, weight))
        states = {key: t if key.endswith(SCALES) else t.view(weight.shape) for key, t in entry.states.items()}
        for run in within(entry.counts, s.start, s.length):
            part = slice(run.start - s.start, run.start - s.start + run.length)
            staged = {key: t[part] for key, t in states.items()}
            self._updates.append(
                SliceUpdate(
                    weight[part],
                    gradient[part],
                    staged.get(MASTER, staged.get(REMAINDER)),
                    staged.get("exp_avg", staged.get("exp_avg" + CODES)),
                    staged["exp_avg_sq"] if "exp_avg_sq" in staged else staged["exp_avg_sq" + CODES],
                    run.step + 1,
                    staged.get("exp_avg" + SCALES),
                    staged.get("exp_avg_sq" + SCALES),
                )
            )

    def apply(self) -> None:
        """Change weights and states; on CUDA a weight in pinned host memory is only written when the current stream has
        come to the end of this."""
        updates, options = self._updates, self._options
        beta1, beta2 = options["betas"]
        apply = adamw if not updates or updates[0].gradient.device.type == "cpu" or _has_triton() else adamw_reference
        apply(
            updates,
            lr=options["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=options["eps"],
            weight_decay=options["weight_decay"],
            scale=self._scale,
            seed=self._seed,
        )
        for home, weight in self._copied:
            if weight is not home:
                home.copy_(weight)
        # a kernel's writes go unseen by autograd, which must refuse a backward through weights that are gone
        torch.autograd.graph.increment_version(self._parameters)


def _is_in_reach(weight: Tensor, gradient: Tensor) -> bool:
    """Whether a weight can be updated where it is."""
    if gradient.device.type == "cpu":
        return True
    if gradient.dtype == torch.float64 or not _has_triton():
        return weight.device == gradient.device
    if weight.device != gradient.device and not weight.is_pinned():
        return False
    return len(join_dims([weight, gradient])[0]) <= KERNEL_DIMS


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None

"""AdamW: what it keeps, its options, and its update by the fused kernel.

On the CPU the update is torch's own functional AdamW, applied to the active slices. With one chunk and float32
weights, parameters therefore equal those of ``torch.optim.AdamW`` to the bit. On CUDA a fused kernel does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from chunkft_fx.errors import OptionError
from chunkft_fx.optim.groups import is_at_least_0, require_at_least_0
from chunkft_fx.optim.optimizer import ChunkedOptimizer
from chunkft_fx.optim.rules.fused_adamw import AdamWUpdate
from chunkft_fx.optim.update import StagedSlice, Update
from chunkft_fx.plan.state_spec import StateSpec, StateTensor


class AdamW(ChunkedOptimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on the active slices of a compiled module.

    Beside ``lr``, ``betas``, ``eps`` and ``weight_decay`` the options are those that `ChunkedOptimizer` describes. The
    states of a parameter are ``exp_avg`` and ``exp_avg_sq`` in ``state_dtype``, and the master weight of a
    low-precision one. ``state_dtype="bfloat16"`` takes 8 instead of 12 bytes of state for a low-precision element and
    rounds stochastically, so that the second moment still decays; float64 parameters keep float64 moments.
    With ``states="reset"`` chunks begin with zero moments whenever they become active, as in BAdam (arXiv 2404.02827).
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float | None = None,
        no_decay: Sequence[str] = (),
        state_dtype: str = "float32",
        states: str = "keep",
        host_budget: int | str | None = None,
        update: str = "step",
    ) -> None:
        moments = (StateTensor("exp_avg", state_dtype), StateTensor("exp_avg_sq", state_dtype))
        super().__init__(
            model,
            StateSpec("AdamW", moments, states),  # 32 bytes moved an element, measured by `benchmarks.bench_kernels`
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            max_grad_norm=max_grad_norm,
            no_decay=no_decay,
            host_budget=host_budget,
            update=update,
            smaller=('state_dtype="bfloat16"',) if state_dtype == "float32" else (),
        )

    def check_options(self, options: Mapping[str, Any]) -> None:
        betas = options["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(is_at_least_0(b) and b < 1 for b in betas):
            raise OptionError(f"betas={betas!r} must be two numbers from 0 up to, but not, 1")
        require_at_least_0(options, "eps", "weight_decay")

    def prepare(
        self, entries: Sequence[StagedSlice], options: Mapping[str, Any], scale: Tensor | None, seed: int
    ) -> Update:
        return AdamWUpdate(entries, options, scale, seed)

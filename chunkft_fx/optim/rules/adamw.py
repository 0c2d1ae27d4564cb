"""AdamW: decides what it keeps by its options, and runs its update by the fused kernel.

On the CPU the update is torch's own functional AdamW, applied to the active slices. With one chunk and float32
weights, parameters therefore equal those of ``torch.optim.AdamW`` to the bit. On CUDA a fused kernel does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chunkft_fx.errors import OptionError
from chunkft_fx.optim.groups import is_at_least_0, require_at_least_0
from chunkft_fx.optim.optimizer import ChunkedOptimizer
from chunkft_fx.optim.rules.fused_adamw import AdamWUpdate
from chunkft_fx.optim.update import StagedSlice, Update
from chunkft_fx.plan.state_spec import LEAST_ROW, StateSpec, StateTensor


class AdamW(ChunkedOptimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on the active slices of a compiled module.

    Beside ``lr``, ``betas``, ``eps`` and ``weight_decay`` the options are those that `ChunkedOptimizer` describes. The
    states of a parameter are ``exp_avg`` and ``exp_avg_sq`` in ``state_dtype``, and the master weight of a
    low-precision one. ``state_dtype="bfloat16"`` takes 8 instead of 12 bytes of state for a low-precision element and
    rounds stochastically, so that the second moment still decays; float64 parameters keep float64 moments.

    ``state_dtype="8bit"`` takes 6.03 bytes: a moment is then ``exp_avg_codes``, uint8 in the parameter's shape, and
    ``exp_avg_scales``, float32[indices, blocks], likewise of ``exp_avg_sq``. Codes are those of torchao's
    ``AdamW8bit``, rounded to the nearest. A block has 256 elements of one index of the dimension along which the
    parameter is cut, or what is left of it, so that chunks change nothing. Parameters with fewer than 64 elements for
    an index, vectors among them, keep float32 moments.

    With ``states="reset"`` chunks begin with zero moments whenever they become active, as in BAdam (arXiv 2404.02827).

    ``master="remainder"`` keeps of the float32 master of a bfloat16 parameter the 16 bits that the parameter lacks, so
    that states take 10 bytes an element, 6 with moments in bfloat16, 4.03 with those in 8 bits; float16 parameters keep
    a float32 master. Masters are the same to the bit as with ``master="float32"``; parameters are their masters rounded
    half up in magnitude, which at exact ties alone is another value. The master of a parameter that was changed from
    outside is the new value with the old remainder, so that it differs from that value by half a unit of bfloat16 at
    most.

    An optimizer that is made with ``betas[0] == 0`` keeps no ``exp_avg``; its ``betas[0]`` cannot change afterwards.
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
        master: str = "float32",
        states: str = "keep",
        host_budget: int | str | None = None,
        update: str = "step",
        schedule_by: str = "sweep",
    ) -> None:
        _check_betas(betas)
        self._has_first_moment = bool(betas[0] != 0)
        average, square = StateTensor("exp_avg", state_dtype), StateTensor("exp_avg_sq", state_dtype, is_signed=False)
        moments = (average, square) if self._has_first_moment else (square,)
        # Of a low-precision element: the gradient is read, weight and states are read and written. The 32 bytes of
        # float32 states are measured by `benchmarks.bench_kernels`; 8-bit scales are too few to count.
        kept = StateSpec("AdamW", moments, master=master).element_nbytes((LEAST_ROW, LEAST_ROW), torch.bfloat16)
        smaller = {
            'state_dtype="8bit"': state_dtype != "8bit",
            'state_dtype="bfloat16"': state_dtype == "float32",
            'master="remainder" (for bfloat16 weights)': master == "float32",
        }
        super().__init__(
            model,
            StateSpec("AdamW", moments, states, update_nbytes=8 + 2 * kept, master=master),
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            max_grad_norm=max_grad_norm,
            no_decay=no_decay,
            host_budget=host_budget,
            update=update,
            schedule_by=schedule_by,
            smaller=[option for option, is_smaller in smaller.items() if is_smaller],
        )

    def check_options(self, options: Mapping[str, Any]) -> None:
        _check_betas(options["betas"])
        if options["betas"][0] != 0 and not self._has_first_moment:
            raise OptionError(
                f"betas={options['betas']!r} was set in a parameter group of an AdamW that was made with betas[0]=0, "
                "and so has no first moments; make a new optimizer"
            )
        require_at_least_0(options, "eps", "weight_decay")

    def unread(self, options: Mapping[str, Any]) -> frozenset[str]:
        return frozenset({"exp_avg"} if options["betas"][0] == 0 else ())

    def prepare(
        self, entries: Sequence[StagedSlice], options: Mapping[str, Any], scale: Tensor | None, seed: int
    ) -> Update:
        return AdamWUpdate(entries, options, scale, seed)


def _check_betas(betas: Any) -> None:
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(is_at_least_0(b) and b < 1 for b in betas):
        raise OptionError(f"betas={betas!r} must be two numbers from 0 up to, but not, 1")

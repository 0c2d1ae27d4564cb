"""Describes a machine as rates: how fast a device multiplies matrices, moves bytes and starts kernels."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

# Assumed where it is not measured: one H200 was measured (`machine.calibrate`) to multiply as fast beside copies.
SLOWED_BY_COPIES = 1.0


@dataclass(frozen=True)
class RankLink:
    """How many ranks train a model together, and how fast the link between them is.

    ``nbytes_per_s`` is what an all-reduce of large tensors moves each way through the busiest link (its bus bandwidth).
    """

    ranks: int = 1
    nbytes_per_s: float = math.inf

    @property
    def us_per_byte(self) -> float:
        """Microseconds for each byte that is averaged over ranks in its own dtype, and of which one rank sends the
        update to all."""
        return (2 * (self.ranks - 1) / self.ranks + (self.ranks > 1)) / self.nbytes_per_s * 1e6


# A process by itself.
ALONE = RankLink()


@dataclass(frozen=True)
class Rates:
    """What one device does a second. ``matmul_flops_per_s`` is by dtype name (``"bfloat16"``), a multiply-add
    counting two.

    ``memory_nbytes_per_s`` counts bytes read plus bytes written in device memory. The host rates are for pinned
    memory, bytes one way; ``both_ways_nbytes_per_s`` is the rate *each way* with both directions busy.
    ``launch_us`` is what one more small kernel costs. Copies both ways take device memory's time, and power, from
    kernels beside them, which then take ``slowed_by_copies`` times as long. All are positive and finite, else
    `ValueError`.
    """

    matmul_flops_per_s: dict[str, float]
    memory_nbytes_per_s: float
    host_to_device_nbytes_per_s: float
    device_to_host_nbytes_per_s: float
    both_ways_nbytes_per_s: float
    launch_us: float
    slowed_by_copies: float = SLOWED_BY_COPIES

    def __post_init__(self) -> None:
        if not self.matmul_flops_per_s:
            raise ValueError("matmul_flops_per_s is empty: give the rate of at least one dtype")
        figures = asdict(self)
        for name, figure in (figures.pop("matmul_flops_per_s") | figures).items():
            if isinstance(figure, bool) or not isinstance(figure, (int, float)):
                raise ValueError(f"{name}={figure!r} is not a number")
            if not (math.isfinite(figure) and figure > 0):
                raise ValueError(f"{name}={figure} must be positive and finite")

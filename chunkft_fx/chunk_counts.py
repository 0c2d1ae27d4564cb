"""How many chunks ``"auto"`` takes on a GPU, where the states of each chunk are copied in and out.

A step with a smaller chunk is faster and trains less. Wanted are the fewest chunks with which a step costs little more
than it must. The *floor* of a step is its forward and its input gradients. From the fewest chunks that fit, the count
grows until copies of states take at most `TRANSFER_SHARE` of the floor, so that they hide under it with room for
jitter, and gradients of weights add at most `UPDATE_SHARE`. Smaller chunks also leave more memory for activations:
of the doublings of that count, the smallest is taken that is within `TOLERANCE` of the fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TRANSFER_SHARE = 0.8
UPDATE_SHARE = 0.05
TOLERANCE = 1.05
# Beyond this many times the first count, activations gain nothing that counts.
MOST_DOUBLINGS = 3


@dataclass(frozen=True)
class StepTimes:
    """Predicted microseconds: of each region forward, backward (input gradients), and to recompute its activations;
    ``gradients_us`` of the gradients of all weights; ``transfer_us`` of all states, both ways at once."""

    forward_us: tuple[float, ...]
    backward_us: tuple[float, ...]
    again_us: tuple[float, ...]
    gradients_us: float
    transfer_us: float

    def floor_us(self) -> float:
        """The mean step of a sweep without gradients of weights: backward ends at each region equally often."""
        regions = len(self.backward_us)
        below = sum(us * (i + 1) for i, us in enumerate(self.backward_us)) / regions
        return sum(self.forward_us) + below

    def step_us(self, count: int, save_from: int) -> float:
        """The mean step of a sweep of ``count`` chunks in which regions below ``save_from`` recompute."""
        again = sum(us * (i + 1) for i, us in enumerate(self.again_us[:save_from])) / len(self.again_us)
        return max(self.floor_us() + again + self.gradients_us / count, self.transfer_us / count)


def candidates(times: StepTimes, fewest: int, most: int) -> tuple[int, ...]:
    """Counts to try: the least that keeps both shares, its doublings, none below ``fewest`` or above ``most``."""
    floor = times.floor_us()
    hidden = times.transfer_us / (TRANSFER_SHARE * floor)
    small = times.gradients_us / (UPDATE_SHARE * floor)
    first = min(max(fewest, int(max(hidden, small)) + 1), most)
    return tuple(sorted({min(first << i, most) for i in range(MOST_DOUBLINGS + 1)}))


def choose(times: StepTimes, fitting: Sequence[tuple[int, int]]) -> int | None:
    """Of (count, first saving region) that fit, the smallest count whose step is nearly the fastest; None of none."""
    if not fitting:
        return None
    steps = {count: times.step_us(count, save_from) for count, save_from in fitting}
    return min(count for count, us in steps.items() if us <= TOLERANCE * min(steps.values()))

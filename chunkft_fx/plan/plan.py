"""Holds the plan: the frozen, serialisable decision of the planner."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from chunkft_fx.plan.chunk import Chunk
from chunkft_fx.plan.policy import Policy
from chunkft_fx.plan.table import Considered, PlanTables

# Of the JSON text of a plan; changes when a field comes, goes or means something else.
VERSION = 3


@dataclass(frozen=True)
class Plan(PlanTables):
    """What a run will do, decided before it starts.

    ``policy`` holds all that programs and passes act on: which weights are streamed, what is saved, and how.
    ``terms`` maps each part of the predicted peak to its bytes, ``host_terms`` each kind of host memory that a GPU's
    training takes beside it (none of it on the CPU), ``peak_at`` names the moment of the step,
    ``predicted_step_us`` is the mean step of a sweep (None on the CPU, where memory alone decides), and
    ``considered`` lists choices that were not taken. ``batch`` says for which input
    shapes the prediction was made, ``batch_nbytes`` how large that batch is; before the first training batch these and
    the prediction are empty, and the policy says nothing.
    """

    budget_bytes: int
    chunks: tuple[Chunk, ...]
    order: str
    interval: int
    seed: int
    policy: Policy = field(default_factory=Policy)
    predicted_peak_bytes: int | None = None
    predicted_step_us: float | None = None
    peak_at: str = ""
    considered: tuple[Considered, ...] = ()
    terms: tuple[tuple[str, int], ...] = ()
    host_terms: tuple[tuple[str, int], ...] = ()
    batch: str = ""
    batch_nbytes: int = 0

    @property
    def streamed(self) -> frozenset[str]:
        """The names of the parameters whose weights stay in host memory."""
        return self.policy.streamed

    def to_json(self) -> str:
        """The plan as JSON text for other programs: its fields, sets as sorted lists, and this format's ``version``."""
        return json.dumps({"version": VERSION} | asdict(self), indent=1, default=sorted)

"""Holds the plan: the frozen, serialisable decision of the planner."""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from chunkft_fx.plan.chunk import Chunk
from chunkft_fx.plan.policy import LinkUse, Policy
from chunkft_fx.plan.schedule import sweep_steps, updates_in
from chunkft_fx.plan.table import Considered, PlanTables

# Of the JSON text of a plan; changes when a field comes, goes or means something else.
VERSION = 6


@dataclass(frozen=True)
class Plan(PlanTables):
    """What a run will do, decided before it starts.

    ``interval`` is the steps of a chunk's turn; with ``warms_up`` turns of the first sweep have one step, and rates
    rise over each chunk's first updates. ``policy`` holds all that programs and passes act on: which weights are
    streamed, what is saved, and how. ``terms`` maps each part of the predicted peak to its bytes, ``host_terms`` each
    kind of host memory that a GPU's training takes beside it (none of it on the CPU), ``peak_at`` names the moment of
    the step,
    ``predicted_step_us`` is the mean step of a sweep (None on the CPU, where memory alone decides), ``link`` what of a
    step that covers all parameters moves between host and device, and ``considered`` lists choices that were not
    taken. ``coverage`` is what a step trains, "one" chunk or "all" parameters, ``coverage_reason`` why, where
    ``coverage="auto"`` chose it. ``batch`` says for which input shapes the prediction was made, ``batch_nbytes`` how
    large that batch is; before the first training batch these and the prediction are empty, and the policy says
    nothing.
    """

    budget_bytes: int
    chunks: tuple[Chunk, ...]
    order: str
    interval: int
    seed: int
    warms_up: bool = False
    policy: Policy = field(default_factory=Policy)
    predicted_peak_bytes: int | None = None
    predicted_step_us: float | None = None
    peak_at: str = ""
    considered: tuple[Considered, ...] = ()
    terms: tuple[tuple[str, int], ...] = ()
    host_terms: tuple[tuple[str, int], ...] = ()
    link: LinkUse | None = None
    batch: str = ""
    batch_nbytes: int = 0
    coverage: str = "one"
    coverage_reason: str = ""

    @property
    def streamed(self) -> frozenset[str]:
        """The names of the parameters whose weights stay in host memory."""
        return self.policy.streamed

    @property
    def sweep_steps(self) -> int:
        """The optimizer steps of a sweep, which updates each weight ``interval`` times; 1 with a single chunk.

        The first one is shorter where chunks warm up: a step for each.
        """
        return sweep_steps(len(self.chunks), self.interval)

    @property
    def predicted_sweep_us(self) -> float | None:
        """The predicted time of a sweep; None where no times are known."""
        return None if self.predicted_step_us is None else self.sweep_steps * self.predicted_step_us

    def updates_in(self, steps: int) -> tuple[int, int]:
        """The updates that a weight gets in a run of so many steps: the fewest, and the most."""
        return updates_in(steps, len(self.chunks), self.interval, self.warms_up)

    def to_json(self) -> str:
        """The plan as JSON text for other programs: its fields, sets as sorted lists, and this format's ``version``."""
        return json.dumps({"version": VERSION} | asdict(self), indent=1, default=sorted)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote. Raises `ValueError` for any other text, or one of another version."""
        content = json.loads(text)
        version = content.pop("version", None) if isinstance(content, dict) else None
        if version != VERSION:
            raise ValueError(f"a plan of version {version!r}, and this library reads version {VERSION}")
        plan: Plan = _read(cls, content, "plan")
        return plan


def _read(kind: Any, value: Any, place: str) -> Any:
    """A JSON value as one of the given type; ``place`` says of which field. Raises `ValueError` if it is none."""
    found, arguments = get_origin(kind), get_args(kind)
    if found in (Union, types.UnionType):
        (kind,) = (k for k in arguments if k is not types.NoneType)
        return None if value is None else _read(kind, value, place)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, Mapping):
        wanted = _fields(kind)
        if value.keys() != wanted.keys():
            raise ValueError(f"{place} has the fields {sorted(value)} instead of {sorted(wanted)}")
        return kind(**{name: _read(wanted[name], v, f"{place}.{name}") for name, v in value.items()})
    if found in (tuple, frozenset) and isinstance(value, list):
        kinds = arguments if found is tuple and arguments[-1] is not ... else arguments[:1] * len(value)
        return found(_read(k, v, place) for k, v in zip(kinds, value, strict=True))
    if kind in (int, float, str, bool) and type(value) in ((int, float) if kind is float else (kind,)):
        return kind(value)
    raise ValueError(f"{place} is {value!r}, which is no {kind}")


@functools.cache
def _fields(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {name: hints[name] for name in kind.__dataclass_fields__}  # type: ignore[attr-defined]

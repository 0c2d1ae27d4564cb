"""The plan: the frozen, serialisable decision of the planner, and the slices and chunks it is made of."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from chunkft_fx.errors import CheckpointMismatch


@dataclass(frozen=True)
class Slice:
    """``parameter.narrow(dim, start, length)``: the unit of gradient, update and streaming.

    ``size`` is the parameter's whole size along ``dim`` (1 for a scalar parameter, whose ``dim`` is 0).
    """

    name: str
    dim: int
    start: int
    length: int
    size: int

    @property
    def is_whole(self) -> bool:
        """True when the slice is the whole parameter."""
        return self.length == self.size


@dataclass(frozen=True)
class Chunk:
    """The slices that are active together; ``numel`` elements, ``nbytes`` of weights and optimizer state."""

    slices: tuple[Slice, ...]
    numel: int
    nbytes: int


@dataclass(frozen=True)
class Considered:
    """A choice that was not taken: what it needs at its peak, most of it for ``largest``, and its predicted mean step.

    ``streamed`` counts regions; ``step_us`` is None where no times are known.
    """

    chunks: int
    streamed: int
    depth: int
    save_from: int
    offload_below: int
    nbytes: int
    step_us: float | None
    largest: str
    head_split: int = 1


@dataclass(frozen=True)
class Plan:
    """What a run will do, decided before it starts.

    ``save_from[k]`` is the first region that keeps its activations while chunk ``k`` is active; the
    regions below it (and above the lowest active slice) recompute them in backward. Regions below
    ``offload_below[k]`` (of those: at most ``save_from[k]``) offload what they keep for that to host memory; empty
    means none. ``streamed`` names the parameters whose weights stay in host memory, ``depth`` the ring buffers that
    they pass through. A chunked head holds ``1 / head_split`` of the logits that it would by itself.
    ``terms`` maps each part of the predicted peak to its bytes, ``peak_at`` names the moment of the step,
    ``predicted_step_us`` is the mean step of a sweep (None on the CPU, where memory alone decides), and
    ``considered`` lists choices that were not taken. ``batch`` says for which input
    shapes the prediction was made, ``batch_nbytes`` how large that batch is; before the first training batch these and
    the prediction are empty. ``state_dtype`` and ``states`` are the optimizer's options that were planned for.
    """

    budget_bytes: int
    chunks: tuple[Chunk, ...]
    order: str
    interval: int
    seed: int
    save_from: tuple[int, ...] = ()
    offload_below: tuple[int, ...] = ()
    streamed: tuple[str, ...] = ()
    depth: int = 2
    head_split: int = 1
    predicted_peak_bytes: int | None = None
    predicted_step_us: float | None = None
    peak_at: str = ""
    considered: tuple[Considered, ...] = ()
    terms: tuple[tuple[str, int], ...] = ()
    batch: str = ""
    batch_nbytes: int = 0
    state_dtype: str = "float32"
    states: str = "keep"

    def __str__(self) -> str:
        """A table for people: budget, predicted peak and its terms, and a line per chunk."""
        from chunkft_fx.plan.table import render

        return render(self)

    def explain(self) -> str:
        """A table of the choices that were not taken, with what each would have needed, largest term first."""
        from chunkft_fx.plan.table import explain

        return explain(self)

    def to_json(self) -> str:
        """The plan as JSON text; ``Plan.from_json`` gives an equal plan back."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan written by ``to_json``; raises ``CheckpointMismatch`` on anything else."""
        try:
            raw: dict[str, Any] = json.loads(text)
            raw["chunks"] = tuple(
                Chunk(tuple(Slice(**s) for s in c["slices"]), c["numel"], c["nbytes"]) for c in raw["chunks"]
            )
            raw["save_from"] = tuple(raw["save_from"])
            raw["offload_below"] = tuple(raw.get("offload_below", ()))
            raw["considered"] = tuple(Considered(**c) for c in raw.get("considered", ()))
            raw["streamed"] = tuple(raw["streamed"])
            raw["terms"] = tuple((name, nbytes) for name, nbytes in raw["terms"])
            return cls(**raw)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointMismatch(f"this text is not a plan written by Plan.to_json: {error}") from error

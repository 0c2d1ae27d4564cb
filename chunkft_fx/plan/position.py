"""Where in the sweep a run is, as checkpoints have it: three counts, and what gives them their meaning.

``{"sweep", "position", "steps", "chunks"}`` count; ``{"order", "seed", "interval", "cuts"}`` name what they were
counted over, ``cuts`` being `cuts_digest` of the plan's chunks. The same counts over other cuts, or in another order,
would train some slices twice in a sweep and others not at all, so they are refused. Counts mean the same with another
seed unless the order is random, and at the start of a chunk's interval with another interval.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from chunkft_fx.errors import CheckpointMismatch, ChunkFTWarning
from chunkft_fx.plan.chunk import Chunk

COUNTS = ("sweep", "position", "steps", "chunks")
MEANING = {"order": str, "seed": int, "interval": int, "cuts": str}


def cuts_digest(chunks: Sequence[Chunk]) -> str:
    """16 hexadecimal digits that tell one way of cutting from another: names and ranges of all slices, in order."""
    cuts = [[[s.name, s.dim, s.start, s.length, s.size] for s in chunk.slices] for chunk in chunks]
    return hashlib.sha256(json.dumps(cuts).encode()).hexdigest()[:16]


def check(state: Mapping[str, Any]) -> None:
    """Raise `CheckpointMismatch` unless this is a position; one of before positions had a meaning is none the less."""
    counts = [state.get(key) for key in COUNTS]
    is_position = all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in counts)
    named = [key for key in MEANING if key in state]
    if named:
        is_position &= all(isinstance(state.get(key), kind) for key, kind in MEANING.items())
    if not is_position or state["position"] >= state["chunks"]:
        raise CheckpointMismatch(f"{dict(state)!r} is not a position saved by ChunkSchedule.state_dict")


def require_same(state: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise `CheckpointMismatch` where a saved position means something else under the ``current`` order, seed,
    interval and cuts; those that ``current`` does not have are not known yet, and not compared.

    A position that names none of them is taken as it is, with a warning.
    """
    if "order" not in state:
        warnings.warn(
            "the saved position is of an older version and does not say over which order, seed, interval and cuts it "
            "counts; it is taken to be the present ones",
            ChunkFTWarning,
            stacklevel=3,
        )
        return
    compared = ["order", "cuts"]
    if state["order"] == "random":
        compared.append("seed")
    if state["steps"]:
        compared.append("interval")
    changed = [key for key in compared if key in current and state[key] != current[key]]
    if changed:
        listed = ", ".join(f"{key} {state[key]} (now {current[key]})" for key in changed)
        raise CheckpointMismatch(
            f"the position in the sweep was saved with {listed} and would mean something else here; compile with the "
            "same chunks, order, seed, interval and budget, or set the position in the checkpoint's entry "
            '"chunkft" to None to begin a new sweep with the saved states'
        )


def warn_of_other_count(state: Mapping[str, Any], chunks: int) -> None:
    """Say that a position with another number of chunks is left unused."""
    warnings.warn(
        f"the position in the sweep was saved with {state['chunks']} chunks and means nothing with {chunks}: "
        "states and step counts are kept, and a new sweep begins",
        ChunkFTWarning,
        stacklevel=3,
    )

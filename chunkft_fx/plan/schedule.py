"""Decides which chunk is active: the schedule of a sweep, and its position as checkpoints have it.

``{"sweep", "position", "steps", "chunks"}`` are counts; ``{"order", "seed", "interval", "cuts", "warms_up"}`` name
what they were counted over, ``cuts`` being `cuts_digest` of the plan's chunks; ``"version"`` is that of this format.
The same counts over other cuts, or in another order, would train some slices twice in a sweep and others not at all, so
they are refused. Counts mean the same with another seed unless the order is random, and at the start of a chunk's turn
with another interval; one that nobody gave ("auto") is refused there, too, since the run would go on as another one
unasked. Version 1 of the format had no ``"warms_up"``, and no run that did.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chunkft_fx.errors import CheckpointMismatch, ChunkFTWarning, OptionError
from chunkft_fx.plan.chunk import Chunk

ORDERS = ("ascending", "descending", "random")
VERSION, READABLE = 2, (1, 2)
# Steps that a sweep has at least under interval="auto". With first moments kept (beta1 of 0.9) turns of one step are
# stable up to a rate of 2, counted in curvatures as Adam scales them, of 2 and 3 steps as a rule up to 2.1 and 2.5,
# n chunks in one step up to 38 / n; a sweep of so many steps is about as stable as dense steps (docs/learning.md).
STEPS_OF_SWEEP = 40
SHORT_TURN, TURNS_LIMIT, DENSE_LIMIT = 3, 2, 38
# Where chunks warm up, a high rate rises over so many updates of each chunk, from one at which an update moves weights
# by this share of their size: a schedule's own warm-up may end before most chunks had a turn, and Adam's first updates
# are as large as any (docs/learning.md).
WARMUP_UPDATES, SAFE_SHARE = 40, 0.02
COUNTS = ("sweep", "position", "steps", "chunks")
MEANING = {"order": str, "seed": int, "interval": int, "cuts": str, "warms_up": bool}


def check_interval(interval: int | str) -> None:
    """Raise `OptionError` for what is neither a number of steps, 1 or more, nor "auto"."""
    is_number = isinstance(interval, int) and not isinstance(interval, bool)
    if interval != "auto" and not (is_number and int(interval) >= 1):
        raise OptionError(f'interval={interval!r} must be a whole number of optimizer steps, 1 or more, or "auto"')


def interval_of(interval: int | str, chunks: int) -> int:
    """The steps that each of so many chunks gets at a turn: what was given, or as "auto" the fewest that are stable.

    One step where there is one chunk, which is always active.
    """
    if interval != "auto":
        return int(interval)
    return 1 if chunks == 1 else math.ceil(STEPS_OF_SWEEP / chunks)


def short_turns(chunks: int, interval: int) -> str:
    """What turns of few steps may do, in a sentence; empty where they are about as stable as dense steps, or longer."""
    usual, dense = interval_of("auto", chunks), DENSE_LIMIT / chunks
    if chunks == 1 or interval >= usual or interval > SHORT_TURN or round(dense) <= TURNS_LIMIT:
        return ""
    return (
        f"{chunks} chunks in turns of {interval} can diverge where dense AdamW does not: so short ones are as a rule "
        f"stable up to a rate of about {TURNS_LIMIT}, dense steps up to {dense:.2g} (docs/learning.md); "
        f'interval="auto" takes {usual} steps'
    )


def usual_turns(chunks: int, interval: int) -> str:
    """Why turns are as long as "auto" takes them, in a sentence; empty where they are not, or shorter ones would do."""
    if interval != interval_of("auto", chunks) or not short_turns(chunks, 1):
        return ""
    return (
        f'turns of {interval} steps are those of interval="auto": {chunks} chunks in turns of one step can diverge '
        "where dense AdamW does not (docs/learning.md)"
    )


def sweep_steps(chunks: int, interval: int) -> int:
    """The optimizer steps of a sweep; with a single chunk each step is one."""
    return chunks * interval if chunks > 1 else 1


def updates_in(steps: int, chunks: int, interval: int, warms_up: bool) -> tuple[int, int]:
    """The updates that a weight gets in the first steps of a run: the fewest, and the most, whatever the order is."""
    if chunks == 1:
        return steps, steps
    if warms_up and steps >= chunks:  # behind a first sweep in turns of one step
        fewest, most = updates_in(steps - chunks, chunks, interval, False)
        return 1 + fewest, 1 + most
    turn = 1 if warms_up else interval
    sweeps, more = divmod(steps, chunks * turn)
    last = max(0, more - (chunks - 1) * turn)
    return sweeps * turn + last, sweeps * turn + min(more, turn)


def cuts_digest(chunks: Sequence[Chunk]) -> str:
    """16 hexadecimal digits that tell one way of cutting from another: names and ranges of all slices, in order."""
    cuts = [[[s.name, s.dim, s.start, s.length, s.size] for s in chunk.slices] for chunk in chunks]
    return hashlib.sha256(json.dumps(cuts).encode()).hexdigest()[:16]


def check_position(state: Mapping[str, Any]) -> None:
    """Raise `CheckpointMismatch` unless this is a whole position of this version."""
    if state.get("version") not in READABLE:
        raise CheckpointMismatch(
            f"the position in the sweep was saved in version {state.get('version')!r} of its format, and this "
            f"chunkft_fx reads versions up to {VERSION}; load it with the chunkft_fx that saved it, or set the "
            'position in the checkpoint\'s entry "chunkft" to None to begin a new sweep with the saved states'
        )
    counts = [state.get(key) for key in COUNTS]
    is_position = all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in counts)
    meaning = _of_this_version(state)
    is_position &= all(isinstance(meaning.get(key), kind) for key, kind in MEANING.items())
    if not is_position or state["position"] >= state["chunks"]:
        raise CheckpointMismatch(f"{dict(state)!r} is not a position saved by ChunkSchedule.state_dict")


def _of_this_version(state: Mapping[str, Any]) -> dict[str, Any]:
    return ({"warms_up": False} if state["version"] == 1 else {}) | dict(state)


def require_same_meaning(state: Mapping[str, Any], current: Mapping[str, Any], is_auto: bool = False) -> None:
    """Raise `CheckpointMismatch` where a saved position means something else under the ``current`` order, seed,
    interval and cuts; those that ``current`` does not have are not known yet, and not compared. With ``is_auto`` nobody
    gave the current interval, and chunks in turn need the saved one also at the start of a turn."""
    state = _of_this_version(state)
    compared = ["order", "cuts"]
    if state["order"] == "random":
        compared.append("seed")
    if state["steps"] or (is_auto and state["chunks"] > 1):
        compared += ["interval", "warms_up"] if is_auto else ["interval"]
    changed = [key for key in compared if key in current and state[key] != current[key]]
    if changed:
        listed = ", ".join(f"{key} {state[key]} (now {current[key]})" for key in changed)
        interval = f"interval={state['interval']}" if {"interval", "warms_up"} & set(changed) else "interval"
        raise CheckpointMismatch(
            f"the position in the sweep was saved with {listed} and would mean something else here; compile with the "
            f"same chunks, order, seed, {interval} and budget, or set the position in the checkpoint's entry "
            '"chunkft" to None to begin a new sweep with the saved states'
        )


def warn_of_other_coverage(state: Mapping[str, Any], coverage: str) -> None:
    """Say that a position is one of steps on a chunk each, where ``coverage`` was chosen to be "all"."""
    if coverage == "one" or state["chunks"] == 1:
        return
    warnings.warn(
        f"the checkpoint is of a training with {state['chunks']} chunks, a chunk a step, and steps train all "
        'parameters here, as coverage="auto" chose at the first call: load it before the first call, or give '
        'coverage="one", to go on as it was',
        ChunkFTWarning,
        stacklevel=3,
    )


def warn_of_other_count(state: Mapping[str, Any], chunks: int) -> None:
    """Say that a position with another number of chunks is left unused."""
    warnings.warn(
        f"the position in the sweep was saved with {state['chunks']} chunks and means nothing with {chunks}: "
        "states and step counts are kept, and a new sweep begins",
        ChunkFTWarning,
        stacklevel=3,
    )


def warn_of_short_turns(schedule: ChunkSchedule) -> None:
    """Say with a `ChunkFTWarning` that training may diverge for the sake of the interval alone."""
    said = short_turns(schedule.chunks, schedule.interval)
    if said:
        warnings.warn(said, ChunkFTWarning, stacklevel=3)


@dataclass
class ChunkSchedule:
    """Which chunk is active: ``interval`` optimizer steps each, every sweep visits every chunk once.

    With ``warms_up`` turns of the first sweep have one step, so that every chunk had an update early on.
    ``order="random"`` draws a new permutation for each sweep from ``seed``, so that a run can be
    repeated and resumed: the state is three counts. ``cuts`` is the digest of the plan's chunks
    (`cuts_digest`), empty where there is no plan.
    """

    chunks: int
    order: str = "ascending"
    interval: int = 1
    seed: int = 0
    sweep: int = 0
    position: int = 0
    steps: int = 0
    cuts: str = ""
    warms_up: bool = False
    _permutations: dict[int, list[int]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise OptionError(f"order={self.order!r} is not known; choose one of {', '.join(ORDERS)}")
        check_interval(self.interval)

    def permutation(self, sweep: int) -> list[int]:
        """The order in which one sweep visits the chunks."""
        if self.order == "ascending":
            return list(range(self.chunks))
        if self.order == "descending":
            return list(reversed(range(self.chunks)))
        if sweep not in self._permutations:
            order = list(range(self.chunks))
            random.Random(self.seed * 1_000_003 + sweep).shuffle(order)
            self._permutations = {sweep: order}
        return self._permutations[sweep]

    @property
    def chunk(self) -> int:
        """The index of the active chunk."""
        return self.permutation(self.sweep)[self.position]

    @property
    def is_at_start(self) -> bool:
        """Whether no step of the current sweep was counted."""
        return self.position == self.steps == 0

    @property
    def turn(self) -> int:
        """The optimizer steps of a turn of the current sweep."""
        return 1 if self.warms_up and self.sweep == 0 else self.interval

    def advance(self) -> bool:
        """Count one optimizer step; returns True when another chunk became active."""
        self.steps += 1
        if self.steps < self.turn:
            return False
        before = self.chunk
        self.steps = 0
        self.position += 1
        if self.position == self.chunks:
            self.position, self.sweep = 0, self.sweep + 1
        return self.chunk != before

    def activate(self, chunk: int) -> None:
        """Make ``chunk`` active within the current sweep, at the start of its interval."""
        if not 0 <= chunk < self.chunks:
            raise OptionError(f"chunk {chunk} does not exist; the plan has chunks 0 to {self.chunks - 1}")
        self.position = self.permutation(self.sweep).index(chunk)
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        """The schedule's position for checkpoints: its counts, over what they count, and the format's version."""
        counts = {"sweep": self.sweep, "position": self.position, "steps": self.steps, "chunks": self.chunks}
        meaning = {"order": self.order, "seed": self.seed, "interval": self.interval, "cuts": self.cuts}
        meaning["warms_up"] = self.warms_up
        return {"version": VERSION} | counts | meaning

    def load_state_dict(self, state: Mapping[str, Any], is_auto: bool = False) -> None:
        """Continue at a position saved by `state_dict`, if it was saved with the same number of chunks.

        With another number of chunks the position has no meaning here: nothing changes, with a `ChunkFTWarning`.
        Raises `CheckpointMismatch` when ``state`` is not such a position, or means something else here: in another
        order, with another seed of a random order, over other cuts, within another interval, or with ``is_auto``, where
        nobody gave the interval, with another one at all.
        """
        check_position(state)
        if state["chunks"] != self.chunks:
            warn_of_other_count(state, self.chunks)
            return
        require_same_meaning(state, self.state_dict(), is_auto)
        self.sweep, self.position, self.steps = state["sweep"], state["position"], state["steps"]

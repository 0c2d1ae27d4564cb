"""Decides the learning rate of an update where a step trains one chunk: by the sweep, or as it is set at the step.

Schedulers move a rate step by step, and the chunks of a sweep would each meet another one: the first chunk a rate of 0
in a warm-up, and sums of rates would differ by as much as a sweep has. So the rate that is set at the first step of a
sweep is held for all of it: a run of n sweeps then follows its schedule as dense training of n steps does, and every
weight's sum is the same. Rates to come are not known, since any scheduler or hand may set them; hence one that is set
within a sweep acts from the next one on, but for 0, which acts at once.

Where chunks warm up (`ChunkSchedule.warms_up`), the first updates of each chunk use less of a high rate: the first a
40th, the next two 40ths, the 40th all of it, but none less than what is safe, or set, if that is lower. Safe are rates
up to 2% of the weights' root mean square: updates are about as large as the rate. A schedule's own warm-up may end
before most chunks have had their first update.

The first sweep has nothing to hold but the beginning of a warm-up, at which a short run would learn nothing. It goes
step by step, and what a chunk got less, or more, than the mean of that sweep is made up in its updates of later sweeps,
which use from half to twice of what they would, but none above the highest that was ever set. A step at which a
scheduler's rates are all 0 takes no chunk's turn. Under linear and cosine schedules that end at 0, anywhere in a sweep,
with a warm-up of at most 3 in 10 steps, sums of rates differ by less than 5% from 8 sweeps on; by step they differ by a
sixth and more there. A run with fewer sweeps differs by its last turn, which some chunks do not get, and so does one
with fewer than 16 in which chunks warm up for most of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from chunkft_fx.errors import CheckpointMismatch, OptionError
from chunkft_fx.optim.groups import check_rate
from chunkft_fx.plan.schedule import SAFE_SHARE, WARMUP_UPDATES, ChunkSchedule

SCHEDULES = ("sweep", "step")

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class GroupRates:
    """The rates of one parameter group: what is ``held``, the ``highest`` set so far, and what each chunk is ``owed``.

    ``safe`` is the rate up to which updates need no warm-up. In the first sweep ``held`` is the rate of its first step,
    and ``owed`` how far a chunk's rates were below it.
    """

    held: float
    highest: float
    owed: tuple[float, ...]
    safe: float = 0.0


@dataclass(frozen=True)
class SweepRates:
    """Where in a sweep the rates of all groups are, ``chunks`` being 0 before the first step.

    ``turns`` counts the steps of each chunk in the first sweep, ``age`` those since rates were last held, ``updates``
    those of each chunk in all sweeps.
    """

    chunks: int = 0
    is_first: bool = True
    age: int = 0
    turns: tuple[int, ...] = ()
    groups: tuple[GroupRates, ...] = ()
    updates: tuple[int, ...] = ()

    def used(
        self, rates: Sequence[float], schedule: ChunkSchedule, weights: Sequence[Sequence[Tensor]]
    ) -> tuple[tuple[float, ...], SweepRates]:
        """The rates that the step of the active chunk uses where ``rates`` are set, a group each; and what follows.

        The ``weights`` of groups are looked at before the first step alone.
        """
        known = self
        if self.chunks != schedule.chunks or len(self.groups) != len(rates):
            safe = [_safe(w) if schedule.warms_up else 0.0 for w in weights]
            known = _begun(schedule.chunks, rates, min(self.updates, default=0), safe)
        if known.is_first and schedule.is_at_start and any(known.turns):
            known = known._made_up()
        chunk = schedule.chunk
        share = _share(known.updates[chunk]) if schedule.warms_up else 1.0
        known = replace(known, updates=_added(known.updates, chunk, 1))
        if known.is_first:
            used = [_warm(rate, share, g.safe) for g, rate in zip(known.groups, rates, strict=True)]
            return tuple(used), known._recorded(rates, chunk, share)
        is_new = schedule.is_at_start or known.age >= schedule.chunks * schedule.turn
        left = schedule.turn - schedule.steps
        pairs = [_used(g, r, is_new, chunk, left, share) for g, r in zip(known.groups, rates, strict=True)]
        age = 1 if is_new else known.age + 1
        return tuple(used for used, _ in pairs), replace(known, age=age, groups=tuple(g for _, g in pairs))

    def _recorded(self, rates: Sequence[float], chunk: int, share: float) -> SweepRates:
        """After a step of the first sweep, which uses a share of the rates as they are set."""
        turns = _added(self.turns, chunk, 1)
        groups = [
            replace(
                g,
                highest=max(g.highest, r),
                owed=_added(g.owed, chunk, _warm(g.held, share, g.safe) - _warm(r, share, g.safe)),
            )
            for g, r in zip(self.groups, rates, strict=True)
        ]
        return replace(self, turns=turns, groups=tuple(groups))

    def _made_up(self) -> SweepRates:
        """After the first sweep: each chunk is owed what its rates were below the mean, over its own steps."""
        steps = sum(self.turns)
        groups = []
        for g in self.groups:
            mean = sum(g.owed) / steps
            owed = tuple(o - t * mean for o, t in zip(g.owed, self.turns, strict=True))
            groups.append(replace(g, owed=owed))
        return replace(self, is_first=False, turns=(), groups=tuple(groups))

    def state_dict(self) -> dict[str, Any] | None:
        """Plain data for checkpoints; None before the first step."""
        if not self.chunks:
            return None
        groups = [{"held": g.held, "highest": g.highest, "owed": list(g.owed), "safe": g.safe} for g in self.groups]
        return {
            "chunks": self.chunks,
            "is_first": self.is_first,
            "age": self.age,
            "turns": list(self.turns),
            "groups": groups,
            "updates": list(self.updates),
        }

    @classmethod
    def read(cls, state: Any) -> SweepRates:
        """What `state_dict` wrote. Raises `CheckpointMismatch` for anything else.

        Chunks of a checkpoint without ``"updates"``, of an older version, did not warm up, and need not any more.
        """
        if state is None:
            return cls()
        try:
            groups = tuple(
                GroupRates(
                    float(g["held"]), float(g["highest"]), tuple(float(o) for o in g["owed"]), float(g.get("safe", 0))
                )
                for g in state["groups"]
            )
            turns = tuple(int(t) for t in state["turns"])
            chunks, is_first, age = int(state["chunks"]), bool(state["is_first"]), int(state["age"])
            updates = tuple(int(u) for u in state.get("updates", [WARMUP_UPDATES] * chunks))
            found = cls(chunks, is_first, age, turns, groups, updates)
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointMismatch(f"the rates of the checkpoint's sweep are not readable: {error!r}") from error
        sizes = {len(g.owed) for g in groups} | {len(updates)} | ({len(turns)} if found.is_first else set())
        if sizes != {found.chunks}:
            others = sorted(sizes - {found.chunks})
            raise CheckpointMismatch(
                f"the checkpoint has rates of a sweep over {found.chunks} chunks, but values for {others}"
            )
        return found


@dataclass(frozen=True)
class Turn:
    """What a step goes by: the rate of each group, None where updates use what is set, and what is known after it.

    A step that takes no turn leaves its chunk active.
    """

    rates: tuple[float, ...] | None
    after: SweepRates
    takes_turn: bool = True


def turn(by: str, known: SweepRates, groups: Sequence[Mapping[str, Any]], schedule: ChunkSchedule) -> Turn:
    """The rates of a step that trains the active chunk. Nothing changes.

    With a single chunk, or ``by="step"``, updates use what the groups say. Else the value of a rate that is a tensor is
    read, and of one on a GPU waited for. Raises `OptionError` for a rate out of range.
    """
    if by == "step" or schedule.chunks == 1:
        return Turn(None, SweepRates())
    rates = [float(g["lr"]) for g in groups]
    for rate in rates:
        check_rate(rate)
    if not any(rates) and any(float(g.get("initial_lr", 0)) > 0 for g in groups):
        return Turn(tuple(rates), known, takes_turn=False)
    used, after = known.used(rates, schedule, [g.get("params", ()) for g in groups])
    return Turn(used, after)


def check_schedule_by(schedule_by: Any) -> None:
    """Raise `OptionError` unless this is a way in which schedules count."""
    if schedule_by not in SCHEDULES:
        raise OptionError(f"schedule_by={schedule_by!r} is not known; choose one of {', '.join(SCHEDULES)}")


def rates_now(groups: Sequence[Mapping[str, Any]]) -> tuple[float | Tensor, ...]:
    """The rates that groups have at this moment; one on a GPU as a copy there, which nothing waits for."""
    rates = (g["lr"] for g in groups)
    return tuple(r.detach().clone() if isinstance(r, Tensor) and r.is_cuda else float(r) for r in rates)


def _begun(chunks: int, rates: Sequence[float], updates: int, safe: Sequence[float]) -> SweepRates:
    """Before the first step of so many chunks, each of which had this many updates at least when there were others."""
    groups = tuple(GroupRates(r, r, (0.0,) * chunks, s) for r, s in zip(rates, safe, strict=True))
    return SweepRates(chunks, turns=(0,) * chunks, groups=groups, updates=(updates,) * chunks)


def _safe(weights: Sequence[Tensor]) -> float:
    """The rate at which an update moves weights by `SAFE_SHARE` of their root mean square; waits for a GPU."""
    squares = 0.0
    for w in weights:
        # a GPU sums 16-bit weights up in float32 as they are; in float64 it would copy them first
        wide = torch.promote_types(w.dtype, torch.float32)
        squares += float(torch.linalg.vector_norm(w.detach(), dtype=wide)) ** 2
    return SAFE_SHARE * math.sqrt(squares / max(sum(w.numel() for w in weights), 1))


def _share(updates: int) -> float:
    """The share of a high rate that a chunk's update uses where chunks warm up, after so many others."""
    return min(1.0, (updates + 1) / WARMUP_UPDATES)


def _warm(rate: float, share: float, safe: float) -> float:
    """What is used of a rate while a chunk warms up."""
    return max(rate * share, min(rate, safe))


def _used(g: GroupRates, rate: float, is_new: bool, chunk: int, left: int, share: float) -> tuple[float, GroupRates]:
    """The rate of a group's update, ``left`` steps before another chunk's turn, and the group after it."""
    held = rate if is_new or g.held == 0 else g.held
    highest = max(g.highest, rate)
    if rate == 0:
        return 0.0, replace(g, held=held, highest=highest)
    usual = _warm(held, share, g.safe)
    used = max(usual / 2, min(usual + g.owed[chunk] / left, 2 * usual, highest))
    return used, replace(g, held=held, highest=highest, owed=_added(g.owed, chunk, usual - used))


def _added(values: tuple[Number, ...], index: int, more: Number) -> tuple[Number, ...]:
    changed = list(values)
    changed[index] += more
    return tuple(changed)

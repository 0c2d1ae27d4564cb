"""Decides what steps may cover by what else the user asked for: some options go with one coverage alone."""

from __future__ import annotations

from chunkft_fx.errors import OptionError
from chunkft_fx.plan.state_spec import StateSpec

# What a step trains: one chunk, all parameters, or what the planner finds better.
COVERAGES = ("one", "all", "auto")


def check_coverage(coverage: str, chunks: int | str) -> None:
    """Raise `OptionError` for a coverage that does not exist, or that does not go with a number of chunks."""
    if coverage not in COVERAGES:
        raise OptionError(f"coverage={coverage!r} is not known; choose one of {', '.join(COVERAGES)}")
    if coverage == "all" and chunks not in ("auto", 1):
        raise OptionError(
            f'chunks={chunks!r} cuts the parameters into chunks that are trained in turn, but coverage="all" trains '
            'all of them in every step; leave chunks out, or use coverage="one"'
        )


def only_coverage(chunks: int | str, order: str, interval: int | str, spec: StateSpec) -> tuple[str, str] | None:
    """The one coverage that goes with what else the user asked for, and which option says so; None if both do."""
    if chunks != "auto":
        return "one", f"chunks={chunks!r} was given"
    if order != "ascending":
        return "one", f"order={order!r} was given, which a sweep over chunks has"
    if interval != "auto":
        return "one", f"interval={interval!r} was given, which is spent on each chunk of a sweep"
    if not spec.is_kept:
        return "one", 'states="reset" begins each chunk anew'
    if spec.needs_all:
        return "all", f'update="{spec.updates}" updates every parameter in every step'
    return None

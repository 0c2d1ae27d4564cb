"""Runs passes, over region graphs and over programs alike: it knows no pass.

Logging, verification and dumps hang on the gap between two passes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from torch import fx

from chunkft_fx.graph.region import RegionGraph
from chunkft_fx.plan.policy import Policy
from chunkft_fx.program.verify_region import describe_outputs, verify
from chunkft_fx.program.verify_streams import verify_streams

log = logging.getLogger("chunkft_fx.passes")

Target = TypeVar("Target")
Given = TypeVar("Given", contravariant=True)

# Called after each pass with its name, the graph, the number of rewrites and the seconds that they took.
Hook = Callable[[str, Target, int, float], None]


class Step(Protocol[Given]):
    """A pass, as the runner sees it."""

    @property
    def name(self) -> str: ...

    def __call__(self, target: Given, /) -> int: ...


def is_verifying() -> bool:
    """Whether graphs are verified after each pass: as ``CHUNKFT_VERIFY`` in the environment says."""
    return os.environ.get("CHUNKFT_VERIFY") == "1"


def over_region(
    region: RegionGraph, passes: Sequence[Step[RegionGraph]], hook: Hook[RegionGraph] | None = None
) -> dict[str, int]:
    """Run passes over a region graph, in place; returns each pass's rewrite count (summed by name).

    With ``CHUNKFT_VERIFY=1`` in the environment the graph is verified after each pass, which raises
    `VerificationError`.
    """
    return _run(region, region.module, passes, describe_outputs, verify, hook)


def over_program(
    module: fx.GraphModule,
    passes: Sequence[Step[fx.GraphModule]],
    policy: Policy,
    hook: Hook[fx.GraphModule] | None = None,
) -> dict[str, int]:
    """`over_region` for a program of ``policy``, of which some streams may not have been written yet."""

    def sound(target: fx.GraphModule, _before: None, _step: Any) -> None:
        target.graph.lint()
        verify_streams(target, replace(policy, streamed=frozenset()))

    return _run(module, module, passes, lambda _target: None, sound, hook)


def _run(
    target: Target,
    module: fx.GraphModule,
    passes: Sequence[Step[Target]],
    look: Callable[[Target], Any],
    check: Callable[[Target, Any, Any], None],
    hook: Hook[Target] | None,
) -> dict[str, int]:
    counts: dict[str, int] = {}
    for step in passes:
        is_checked = is_verifying()
        before = look(target) if is_checked else None
        begin = time.perf_counter()
        rewrites = step(target)
        seconds = time.perf_counter() - begin
        module.recompile()
        counts[step.name] = counts.get(step.name, 0) + rewrites
        log.debug("%s: %d rewrites in %.1f ms", step.name, rewrites, seconds * 1e3)
        if is_checked:
            check(target, before, step)
        if hook is not None:
            hook(step.name, target, rewrites, seconds)
    return counts

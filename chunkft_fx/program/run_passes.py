"""The pass runner: it knows no pass. Logging, verification and dumps hang on the gap between two passes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence

from chunkft_fx.graph.region import Pass, RegionGraph
from chunkft_fx.program.verify_region import describe_outputs, verify

log = logging.getLogger("chunkft_fx.passes")

Hook = Callable[[str, RegionGraph, int, float], None]


def run(region: RegionGraph, passes: Sequence[Pass], hook: Hook | None = None) -> dict[str, int]:
    """Run passes over a region graph, in place; returns each pass's rewrite count (summed by name).

    ``hook(name, region, rewrites, seconds)`` is called after each pass. With ``CHUNKFT_VERIFY=1`` in the
    environment the graph is verified after each pass, which raises `VerificationError`.
    """
    counts: dict[str, int] = {}
    for step in passes:
        checks = os.environ.get("CHUNKFT_VERIFY") == "1"
        before = describe_outputs(region) if checks else None
        begin = time.perf_counter()
        rewrites = step(region)
        seconds = time.perf_counter() - begin
        region.module.recompile()
        counts[step.name] = counts.get(step.name, 0) + rewrites
        log.debug("%s: %d rewrites in %.1f ms", step.name, rewrites, seconds * 1e3)
        if before is not None:
            verify(region, before, step)
        if hook is not None:
            hook(step.name, region, rewrites, seconds)
    return counts

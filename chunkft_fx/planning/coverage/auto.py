"""Decides what a step trains where the user leaves it open (``coverage="auto"``): one chunk, or all parameters.

A sweep of n steps that train a chunk each is taken to teach as much as one step that trains all parameters. So both are
planned, and all parameters are trained unless that is predicted to take longer than the sweep, or does not fit the
budget or host memory. Where no times are known, as on the CPU, only what fits counts. The decision stays once training
has begun.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from chunkft_fx.bytes import format_bytes
from chunkft_fx.copies import host_memory
from chunkft_fx.errors import BudgetInfeasible
from chunkft_fx.plan.plan import Plan
from chunkft_fx.plan.state_spec import StateSpec
from chunkft_fx.planning.coverage.asked import only_coverage
from chunkft_fx.planning.kept_plans import known_or_made
from chunkft_fx.planning.planner import Options
from chunkft_fx.predict.predictor import Predictor
from chunkft_fx.ranks.ranks import on_this_host

BEGUN = "training has begun with it"


def covering_plan(
    model: nn.Module,
    options: Options,
    known: Plan | None,
    predictor: Callable[[], Predictor],
    batch: str,
    spec: StateSpec,
    micro_batches: int = 1,
    begun: str | None = None,
    untaken: int | None = None,
) -> Plan:
    """The plan for a batch (`kept_plans.known_or_made`), of the coverage that is asked for, or chosen here.

    Each ``predictor`` makes predictions for one coverage. ``begun`` is the coverage that training has begun with, if it
    has; ``untaken`` are the bytes of host memory that the optimizer's states are still to take, where there is one.
    Raises `BudgetInfeasible` if neither coverage fits.
    """

    def made(coverage: str) -> Plan:
        asked = replace(options, coverage=coverage)
        return known_or_made(model, asked, known, predictor(), batch, spec, micro_batches)

    if options.coverage != "auto":
        return made(options.coverage)
    only = only_coverage(options.chunks, options.order, options.interval, spec)
    if only is None and begun is not None:
        only = begun, BEGUN
    if only is not None:
        coverage, why = only
        return replace(made(coverage), coverage_reason=why)
    every, one = _attempt(made, "all"), _attempt(made, "one")
    if isinstance(every, BudgetInfeasible) and isinstance(one, BudgetInfeasible):
        raise min(every, one, key=lambda error: error.smallest_budget_bytes)
    plan, why = _better(every, one, _shortage(every, untaken, options.rates is None))
    return replace(plan, coverage_reason=why)


def _attempt(made: Callable[[str], Plan], coverage: str) -> Plan | BudgetInfeasible:
    try:
        return made(coverage)
    except BudgetInfeasible as error:
        return error


def _shortage(every: Plan | BudgetInfeasible, untaken: int | None, is_here: bool) -> str | None:
    """Why host memory cannot hold what training all parameters keeps there; None if it can, or is another machine's."""
    if isinstance(every, BudgetInfeasible) or not is_here:
        return None
    kinds = dict(every.host_terms)
    states = kinds.get("optimizer states", 0) if untaken is None else untaken
    needed, limit = states + kinds.get("gradients", 0), host_memory.available_nbytes() // on_this_host()
    if needed <= limit:
        return None
    return (
        f"the states and gradients of all parameters take {format_bytes(needed)} of host memory, of which "
        f"{format_bytes(limit)} are available"
    )


def _better(every: Plan | BudgetInfeasible, one: Plan | BudgetInfeasible, shortage: str | None) -> tuple[Plan, str]:
    """The plan to go by, of the two or the one that there is, and why."""
    if isinstance(one, BudgetInfeasible):
        assert isinstance(every, Plan), "one of them fits"
        return every, f"a step that trains one chunk needs {format_bytes(one.smallest_budget_bytes)} of the device"
    if isinstance(every, BudgetInfeasible):
        needed = format_bytes(every.smallest_budget_bytes)
        return one, f"a step that trains all parameters needs {needed} of the device"
    if shortage is not None:
        return one, shortage
    sweep = f"a sweep of {len(one.chunks)} chunk(s)"
    if every.predicted_step_us is None or one.predicted_step_us is None:
        return every, f"times are not known here, and such a step is taken to teach as much as {sweep}"
    covering_us, sweep_us = every.predicted_step_us, len(one.chunks) * one.predicted_step_us
    takes = f"a step on all parameters takes {_ms(covering_us)}, {sweep} {_ms(sweep_us)}"
    return (every if covering_us <= sweep_us else one), f"{takes}, and they are taken to teach as much"


def _ms(us: float) -> str:
    return f"{us / 1e3:.0f} ms" if us >= 1e5 else f"{us / 1e3:.3g} ms"

"""Prepares the plan of a run without training, and says what the run would take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from chunkft_fx.machine.rates import Rates
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.plan.plan import Plan
from chunkft_fx.tools.data.rows import Batch
from chunkft_fx.tools.models.tasks import call_options
from chunkft_fx.tools.training.options import TrainOptions

# Of host memory, of which nothing is taken to plan: the plan says how much training needs.
NO_LIMIT = 2**62
HOUR_US = 3.6e9


def plan_of(
    compiling: Callable[[nn.Module], CompiledModule],
    plain: nn.Module,
    batch: Batch,
    options: TrainOptions,
    rates: Rates | None,
) -> Plan:
    """The plan that the first batch of a run leads to, here or on a machine of ``rates``: then nothing runs."""
    compiled = compiling(plain)
    optimizer = options.make_optimizer(compiled, host_budget=NO_LIMIT)
    arguments = dict(batch) | call_options(compiled, options.task)
    if rates is not None:
        compiled._training.plan_elsewhere(arguments, rates)
    else:
        device = next(compiled.parameters()).device
        compiled(**{n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()})
    assert compiled._training.optimizer is optimizer, "held until there is a plan, which is for its states"
    return compiled.plan


def times(plan: Plan, options: TrainOptions, row_length: int, scored_every: int | None = None) -> list[str]:
    """What a run takes, as far as it is known; ``scored_every`` so many steps, if anything is held out."""
    tokens = options.steps * options.accumulate * options.batch_size * row_length
    fewest, most = plan.updates_in(options.steps)
    updates = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    lines = [f"{options.steps:,} steps over {tokens:,} tokens update each weight {updates} times"]
    if scored_every is not None:
        early = f", and ended behind {options.patience} that are no better" if options.patience else ""
        lines.append(f"scored every {scored_every:,} steps{early}")
    if plan.predicted_step_us is None:
        return [*lines, "hours are not known: no rates of this machine are; plan for a GPU with --rates"]
    hours = options.steps * options.accumulate * plan.predicted_step_us / HOUR_US
    return [*lines, f"predicted to take {hours:.2f} hours, without scores and checkpoints"]

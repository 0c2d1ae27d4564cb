"""Graph passes over region graphs and over programs, one a file, and the order in which they run."""

from __future__ import annotations

if __name__ != "chunkft_fx.passes":
    # Two copies of this package would mean two sets of rules and classes that do not know each other.
    raise ImportError(f"import this package as chunkft_fx.passes, not as {__name__}")

import torch

from chunkft_fx.graph import ops
from chunkft_fx.graph.region import OutputDemand, Pass, ProgramPass
from chunkft_fx.passes.program.insert_reduces import InsertReduces
from chunkft_fx.passes.program.insert_streams import InsertStreams
from chunkft_fx.passes.program.insert_updates import InsertUpdates
from chunkft_fx.passes.program.offload_saved import OffloadSaved
from chunkft_fx.passes.program.repeat_calls import RepeatCalls
from chunkft_fx.passes.program.schedule_prefetch import SchedulePrefetch
from chunkft_fx.passes.program.schedule_states import ScheduleStates
from chunkft_fx.passes.region.canonicalize import Canonicalize
from chunkft_fx.passes.region.chunk_logits import ChunkLogits
from chunkft_fx.passes.region.eliminate import Eliminate
from chunkft_fx.passes.region.lower_triton import Choices, LowerTriton
from chunkft_fx.passes.region.prune_tangents import PruneTangents
from chunkft_fx.passes.region.select_slices import SelectSlices
from chunkft_fx.passes.region.sink_slices import SinkSlices
from chunkft_fx.passes.region.split_head import SplitHead
from chunkft_fx.plan.policy import Policy, RegionPolicy

__all__ = [
    "Canonicalize",
    "ChunkLogits",
    "Eliminate",
    "InsertReduces",
    "InsertStreams",
    "InsertUpdates",
    "LowerTriton",
    "OffloadSaved",
    "PruneTangents",
    "RepeatCalls",
    "SchedulePrefetch",
    "ScheduleStates",
    "SelectSlices",
    "SinkSlices",
    "SplitHead",
    "default_pipeline",
    "lowering_pipeline",
    "program_pipeline",
]

# The policy of a graph that is looked at by itself.
ALONE = RegionPolicy()


def default_pipeline(demand: tuple[OutputDemand, ...], policy: RegionPolicy = ALONE) -> tuple[Pass, ...]:
    """The passes that turn a region's joint graph into one that computes just ``demand``, in order."""
    sliced = (Canonicalize(), SelectSlices(demand), Eliminate(), SinkSlices(), Eliminate())
    return (*sliced, ChunkLogits(), SplitHead(policy.head_split))


def lowering_pipeline(choices: Choices) -> tuple[Pass, ...]:
    """The passes that follow once it is decided which operators compute what is left, in order."""
    return (LowerTriton(choices),)


def program_pipeline(policy: Policy, device: torch.device, state_nbytes: int = 0) -> tuple[ProgramPass, ...]:
    """The passes that give a program on ``device`` its stream nodes, in order.

    ``state_nbytes`` are the bytes of optimizer states that come in during the step.
    """
    repeated = (RepeatCalls(policy.micro_batches),) if policy.micro_batches > 1 else ()
    taker = ops.update if policy.in_backward else ops.keep
    updates = (InsertUpdates(policy.pieces, taker),) if policy.takes_gradients else ()
    reduces = (InsertReduces(),) if policy.ranks > 1 and not policy.takes_gradients else ()
    streams = (
        *repeated,
        *updates,
        *reduces,
        OffloadSaved(policy.offload_below, device),
        InsertStreams(policy.streamed, device, policy.depth),
        SchedulePrefetch(),
    )
    if policy.pacing is None or not state_nbytes:
        return streams
    times = policy.pacing.times(1 / policy.micro_batches)
    return (*streams, ScheduleStates(times, policy.save_from, state_nbytes))

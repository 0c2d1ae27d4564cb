"""Graph passes over region graphs, one a file, and the order in which they run."""

from __future__ import annotations

if __name__ != "chunkft_fx.passes":
    # Two copies of this package would mean two sets of rules and classes that do not know each other.
    raise ImportError(f"import this package as chunkft_fx.passes, not as {__name__}")

from chunkft_fx.graph.region import OutputDemand, Pass
from chunkft_fx.passes.region.canonicalize import Canonicalize
from chunkft_fx.passes.region.chunk_logits import ChunkLogits
from chunkft_fx.passes.region.eliminate import Eliminate
from chunkft_fx.passes.region.lower_triton import Choices, LowerTriton
from chunkft_fx.passes.region.prune_tangents import PruneTangents
from chunkft_fx.passes.region.select_slices import SelectSlices
from chunkft_fx.passes.region.sink_slices import SinkSlices
from chunkft_fx.passes.region.split_head import SplitHead

__all__ = [
    "Canonicalize",
    "ChunkLogits",
    "Eliminate",
    "LowerTriton",
    "PruneTangents",
    "SelectSlices",
    "SinkSlices",
    "SplitHead",
    "default_pipeline",
    "lowering_pipeline",
]


def default_pipeline(demand: tuple[OutputDemand, ...], head_split: int = 1) -> tuple[Pass, ...]:
    """The passes that turn a region's joint graph into one that computes just ``demand``, in order."""
    sliced = (Canonicalize(), SelectSlices(demand), Eliminate(), SinkSlices(), Eliminate())
    return (*sliced, ChunkLogits(), SplitHead(head_split))


def lowering_pipeline(choices: Choices) -> tuple[Pass, ...]:
    """The passes that follow once it is decided which operators compute what is left, in order."""
    return (LowerTriton(choices),)

"""split_head: let the chunked head hold fewer logits at a time.

Contract: results stay equal up to the order in which blocks are summed. Every operator of a chunked head takes
``split`` times as many blocks of tokens. How often is decided by the plan.

Terms: a *block* is the tokens whose logits exist at the same time (`chunkft_fx.head.operators`).

Before::

    both = chunkft_fx.linear_cross_entropy_grad(x, w, None, labels, -100, 0.0, True, [True, False, False])

After, with ``split=4``::

    both = chunkft_fx.linear_cross_entropy_grad(x, w, None, labels, -100, 0.0, True, [True, False, False], split = 4)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chunkft_fx.graph.region import RegionGraph
from chunkft_fx.head.operators import is_head


@dataclass(frozen=True)
class SplitHead:
    """Set the split of each head; 1 leaves the graph as it is."""

    split: int = 1
    name: str = "split_head"
    numerics: Literal["bitwise", "reassociated"] = "reassociated"

    def __call__(self, region: RegionGraph) -> int:
        if self.split == 1:
            return 0
        heads = [node for node in region.graph.nodes if is_head(node)]
        for node in heads:
            node.kwargs = {**node.kwargs, "split": self.split}
        return len(heads)

"""Runs the means of one backward's gradients over ranks, each as soon as the gradient is complete.

A parameter may have a gradient on some ranks and none on others, whose batch made no use of it. Ranks find that out
when they meet before the backward. Then gradients are only added up within it, and averaged behind it in an order that
all ranks know, with zeros where a rank has none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed import Work

from chunkft_fx.errors import RanksDisagree
from chunkft_fx.gradients.slices import ActiveSlice, summed
from chunkft_fx.graph.layout import wide_dtype
from chunkft_fx.ranks.ranks import Ranks


class Reduction:
    """The means over ``ranks`` of the gradients of these slices, by parameter name.

    ``others`` are parameters that have a gradient on another rank only; None where all ranks have the same ones, whose
    means begin as the program says.
    """

    def __init__(
        self, ranks: Ranks, slices: Mapping[str, ActiveSlice], device: torch.device, others: Sequence[str] | None
    ) -> None:
        self._ranks, self._slices, self._device, self._others = ranks, slices, device, others
        self._means: dict[str, Tensor] = {}
        self._works: list[Work | None] = []

    def begin(self, name: str, contributions: Sequence[Tensor]) -> Tensor:
        """Add up the contributions to a gradient, and what earlier passes left of it, and begin its mean over ranks."""
        s = self._slices[name]
        total, earlier, wide = summed(contributions), s.grad, wide_dtype(s.parameter.dtype)
        if earlier is not None:
            total = earlier.to(wide, copy=True).add_(total)
        elif total.dtype != wide or wide == s.parameter.dtype:  # else it was made for this slice alone
            total = total.to(wide, copy=True, memory_format=torch.contiguous_format)
        self._means[name] = total.contiguous()
        if self._others is None:
            self._works.append(self._ranks.mean(self._means[name]))
        return self._means[name]

    def finish(self) -> dict[str, Tensor]:
        """Complete the means; returns those of gradients that this rank has not."""
        missing = {}
        for name in self._others or ():
            s = self._slices[name]
            earlier, wide = s.grad, wide_dtype(s.parameter.dtype)
            missing[name] = torch.zeros(s.weight().shape, dtype=wide, device=self._device)
            if earlier is not None:
                missing[name].add_(earlier)
        if self._others is not None:
            found = self._means | missing
            self._works += [self._ranks.mean(found[name]) for name in sorted(found)]
        self._ranks.wait(self._works)
        for name in (*self._means, *missing):
            self._slices[name].parameter.grad = None  # it is in the mean
        return missing


def agreed(
    ranks: Ranks, own: Sequence[str], pieces: Sequence[tuple[int, tuple[str, ...]]], word: str
) -> list[str] | None:
    """What other ranks have a gradient of, and this one has not, in the backward that they are about to run together.

    None where all have the same. ``own`` are the parameters whose gradients this one averages one by one, ``pieces``
    those that it takes, with theirs. ``word`` says what else has to be the same. Raises `RanksDisagree` on all ranks.
    """
    found = ranks.compare("a backward", json.dumps([word, pieces, own]))
    if len(set(found)) == 1:
        return None
    read = [json.loads(f) for f in found]
    other = next((rank for rank, (said, *_) in enumerate(read) if said != read[0][0]), None)
    if other is not None:
        raise RanksDisagree(
            f"ranks are at different places of one training: rank 0 at {read[0][0]}, rank {other} at {read[other][0]}; "
            "every rank has to make as many steps, with the same options"
        )
    other = next((rank for rank, (_, parts, _) in enumerate(read) if parts != read[0][1]), None)
    if other is not None:
        missed = sorted(
            {n for _, names in read[0][1] for n in names} ^ {n for _, names in read[other][1] for n in names}
        )
        raise RanksDisagree(
            f"{', '.join(missed[:3]) or 'a parameter'} has a gradient on one of ranks 0 and {other} alone, and this "
            "plan takes gradients within the backward; have every batch use all parameters, or train a chunk a step "
            '(coverage="one")'
        )
    return sorted({name for _, _, names in read for name in names} - set(own))

"""Copies the joint graph of equal blocks: three of them are traced by torch, and the others written from those.

torch takes about a millisecond for each node of a joint graph, and most of a large model's nodes are those of equal
blocks. `repeats.find` finds the blocks, `repeats.fill` copies them, and both only where nothing tells them apart: else
the whole model is traced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from chunkft_fx.capture.blocks import block_paths, locate
from chunkft_fx.capture.capture import Capture, capture
from chunkft_fx.capture.repeats.fill import fill
from chunkft_fx.capture.repeats.find import without_repeats
from chunkft_fx.capture.user_code import own_derivative, path_of

__all__ = ["captured"]


def captured(
    gm: fx.GraphModule, inputs: Sequence[Any], names: Mapping[int, str], backend: str, model: nn.Module
) -> Capture:
    """The capture of Dynamo's graph of a model (see `capture.capture.capture`), its nodes located in modules."""
    path, own = path_of(gm), own_derivative(gm)
    return replace(_captured(gm, inputs, names, backend, model), path=path, own_derivative=own)


def _captured(
    gm: fx.GraphModule, inputs: Sequence[Any], names: Mapping[int, str], backend: str, model: nn.Module
) -> Capture:
    modules = list(model.named_modules())
    blocks = block_paths(modules)
    found = without_repeats(gm, inputs, modules, blocks)
    if found is not None:
        shortened, repeats = found
        short = capture(shortened, inputs, names, backend)
        locate(short.graph, modules)
        if fill(short, repeats, blocks):
            return short
    whole = capture(gm, inputs, names, backend)
    locate(whole.graph, modules)
    return whole

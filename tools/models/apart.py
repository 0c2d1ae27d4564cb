"""Finds how documents in one row stay apart in a model: that none sees another, and each has its own positions.

A model is told by position ids that begin anew where documents do. transformers makes attention masks from them, for
all of its attention implementations, as long as it is called without a cache and its class does so. Others get the
masks. Models with a state that runs on, or with positions of their own, can do neither.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chunkft_fx.errors import OptionError
from chunkft_fx.tools.data.rows import block_mask
from chunkft_fx.tools.models.tasks import call_options

# Tokens of the two documents that are tried.
FIRST, SECOND = 5, 7
# Of the change that a document in front makes where it is seen: what a right model is below, and rounding as well.
SEEN, ROUNDING = 1e-3, 0.1


@torch.no_grad()
def needs_masks(model: Any, vocabulary: int, name: str, task: str = "causal") -> bool:
    """Whether documents of one row stay apart only with a mask; tries it on random tokens.

    Raises `OptionError` for a model that mixes them in both cases.
    """
    was_training = model.training
    model.eval()
    try:
        fault = _fault(model, vocabulary, task, False)
        if fault is None:
            return False
        if not _has_windows(model.config) and _fault(model, vocabulary, task, True) is None:
            return True
    finally:
        model.train(was_training)
    raise OptionError(f"model {name!r} {fault} when several are packed in a row; give --no-packing")


def _fault(model: Any, vocabulary: int, task: str, masked: bool) -> str | None:
    """What a model does wrong with two documents in a row."""
    device, more = next(model.parameters()).device, call_options(model, task)
    rows = torch.randint(0, vocabulary, (2, FIRST + SECOND), generator=torch.Generator().manual_seed(0))
    rows[1, FIRST:] = rows[0, FIRST:]  # two rows that differ in the first document alone
    positions = torch.cat([torch.arange(FIRST), torch.arange(SECOND)]).expand(2, -1)
    apart = {"position_ids": positions} | (
        {"attention_mask": block_mask(positions, task == "causal")} if masked else {}
    )
    alone = _logits(model, rows[:1, FIRST:].to(device), more)
    seen = _logits(model, rows.to(device), more)[:, FIRST:]
    try:
        packed = _logits(model, rows.to(device), more | {k: t.to(device) for k, t in apart.items()})[:, FIRST:]
    except (TypeError, ValueError, RuntimeError):
        return "takes no position ids"
    change = float((seen[0] - alone[0]).abs().max())
    if float((packed[0] - packed[1]).abs().max()) > SEEN * change:
        return "has a document see the one in front of it"
    if float((packed[0] - alone[0]).abs().max()) > ROUNDING * change:
        return "gives a document other positions than it has alone"
    return None


def _logits(model: Any, ids: Tensor, given: dict[str, Any]) -> Tensor:
    return model(input_ids=ids, **given).logits.float()


def _has_windows(config: Any) -> bool:
    """Whether some layers see near tokens only: one mask for all layers would have them see far ones."""
    return any(value for key, value in config.to_dict().items() if "window" in key or "local" in key)

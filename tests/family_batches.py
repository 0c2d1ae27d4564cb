"""Training inputs for any transformers model, from the names in its forward's signature and its configuration."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from tests.family_configs import IMAGE

TOKENS = 16
ORDINARY = (8, 100)


def batch_for(model: nn.Module, task: str, size: int = 2, tokens: int = TOKENS) -> dict[str, Any]:
    """A batch of ``size`` examples; text is ``tokens`` long."""
    names = inspect.signature(model.forward).parameters
    config: Any = model.config
    generator = torch.Generator().manual_seed(17)
    text = torch.randint(*ORDINARY, (size, tokens), generator=generator)
    batch: dict[str, Any] = {}
    main = str(getattr(model, "main_input_name", "input_ids"))
    if ("input_ids" in names and main != "pixel_values" and main != "input_features" and main != "input_values") or (
        "input_ids" in names and task == "image_text_to_text"
    ):
        batch["input_ids"] = text
    if "attention_mask" in names and "input_ids" in batch:
        mask = torch.ones_like(text)
        mask[0, tokens - 3 :] = 0
        batch["attention_mask"] = mask
    if "decoder_input_ids" in names:
        batch["decoder_input_ids"] = torch.randint(*ORDINARY, (size, tokens), generator=generator)
    if "bbox" in names:
        corner = torch.randint(0, 50, (size, tokens, 2), generator=generator)
        batch["bbox"] = torch.cat([corner, corner + 7], -1)
    if "pixel_values" in names:
        batch["pixel_values"] = _pixels(config, size, generator)
    if "input_features" in names:
        batch["input_features"] = _features(config, size, generator)
    if "input_values" in names:
        batch["input_values"] = _waves(config, model, size, generator)
    if "labels" in names:
        batch["labels"] = _labels(model, task, batch, size, tokens, generator)
    return batch


def _find(config: Any, *names: str) -> Any:
    """The first of these attributes that a configuration or one of its parts has."""
    parts = [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))]
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return None


def _pixels(config: Any, size: int, generator: torch.Generator) -> Tensor:
    side = _find(config, "image_size", "input_size", "resolution") or 2 * IMAGE
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    channels = _find(config, "num_channels", "in_channels") or 3
    return torch.randn(size, int(channels), int(height), int(width), generator=generator)


def _features(config: Any, size: int, generator: torch.Generator) -> Tensor:
    bins = _find(config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim") or 80
    frames = 2 * (_find(config, "max_source_positions") or 32)
    return torch.randn(size, int(bins), int(frames), generator=generator)


def _waves(config: Any, model: nn.Module, size: int, generator: torch.Generator) -> Tensor:
    length, bins = _find(config, "max_length"), _find(config, "num_mel_bins")
    if length and bins and not hasattr(config, "conv_dim"):
        return torch.randn(size, int(length), int(bins), generator=generator)
    return torch.randn(size, 3200, generator=generator)


def _labels(
    model: nn.Module, task: str, batch: dict[str, Any], size: int, tokens: int, generator: torch.Generator
) -> Tensor:
    config: Any = model.config
    if re.search("classification", task):
        return torch.randint(0, int(config.num_labels), (size,), generator=generator)
    if task == "ctc":
        return torch.randint(*ORDINARY, (size, 3), generator=generator)
    labels = torch.randint(*ORDINARY, (size, tokens), generator=generator)
    labels[0, :2] = -100
    return labels


def loss_of(result: Any) -> Tensor:
    """The loss that a model returned; without one, the mean square of its first floating output."""
    loss = result.get("loss") if hasattr(result, "get") else None
    if isinstance(loss, Tensor):
        return loss.mean()
    values = list(result.values()) if hasattr(result, "values") else [result] if isinstance(result, Tensor) else result
    found = next(v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.requires_grad)
    return found.square().mean()

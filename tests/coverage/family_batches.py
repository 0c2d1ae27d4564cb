"""Training inputs for any transformers model, from the names in its forward's signature and its configuration."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from tests.coverage.family_configs import IMAGE

TOKENS = 16
ORDINARY = (8, 88)


def batch_for(model: nn.Module, task: str, size: int = 2, tokens: int = TOKENS) -> dict[str, Any]:
    """A batch of ``size`` examples; text is ``tokens`` long."""
    names = inspect.signature(model.forward).parameters
    config: Any = model.config
    generator = torch.Generator().manual_seed(17)
    text = torch.randint(*ORDINARY, (size, tokens), generator=generator)
    batch: dict[str, Any] = {}
    main = str(getattr(model, "main_input_name", "input_ids"))
    if "input_ids" in names and (main.startswith("input_id") or task == "image_text_to_text"):
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
    if "pixel_values" in names and "image_grid_thw" in names:
        batch |= _patches(config, size, generator)
    elif "pixel_values" in names:
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


def _patches(config: Any, size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Images of 4 by 4 patches, each patch a row."""
    side, frames = _find(config, "patch_size"), _find(config, "temporal_patch_size") or 1
    features = int(_find(config, "in_channels", "num_channels") or 3) * int(frames) * int(side) ** 2
    return {
        "pixel_values": torch.randn(16 * size, features, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * size),
    }


def with_image_tokens(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with as many image tokens in its text as the model says that it has image features.

    Models tell the number in the error that they raise for another one.
    """
    token = _find(model.config, "image_token_id", "image_token_index")
    if "input_ids" not in batch or "pixel_values" not in batch or token is None:
        return batch
    try:
        model(**batch)
    except Exception as error:
        told = re.search(r"features:? (\d+)", str(error))
        if told is None:
            raise
        each = int(told[1]) // len(batch["input_ids"])
        return batch | _with_image(model, batch, torch.full((len(batch["input_ids"]), each), int(token)))
    return batch


def _with_image(model: nn.Module, batch: dict[str, Any], image: Tensor) -> dict[str, Tensor]:
    """Text, mask and labels with image tokens before them."""
    fill = {"input_ids": image, "attention_mask": torch.ones_like(image), "labels": torch.full_like(image, -100)}
    longer = {n: torch.cat([first, batch[n]], 1) for n, first in fill.items() if n in batch}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        longer["mm_token_type_ids"] = (longer["input_ids"] == image[0, 0]).long()
    return longer


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
        return torch.randint(ORDINARY[0], min(ORDINARY[1], int(config.vocab_size)), (size, 3), generator=generator)
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

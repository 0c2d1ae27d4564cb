"""Models and tokenizers by name: a folder, a name on the Hugging Face hub, or a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chunkft_fx.errors import OptionError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(device: str) -> torch.device:
    """``"auto"`` (CUDA when there is any), ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; raises `OptionError` for others."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"device {device!r} is not known; use auto, cpu or cuda") from error
    if chosen.type not in ("cpu", "cuda"):
        raise OptionError(f"device {device!r} is not supported; use auto, cpu or cuda")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device {device!r} was asked for, but this torch finds no CUDA device; use cpu")
    return chosen


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of the weights; ``"auto"`` is bfloat16 on CUDA and float32 on the CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise OptionError(f"dtype {dtype!r} is not known; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def source(model: str) -> tuple[str, dict[str, str]]:
    """What transformers' ``from_pretrained`` takes for a model: a folder or hub name, and the GGUF file in it."""
    path = Path(model)
    if path.suffix != ".gguf":
        if not path.exists() and (path.is_absolute() or model.startswith((".", "~"))):
            raise OptionError(f"there is no model at {model}; give a folder, a hub name or a .gguf file")
        return model, {}
    if not path.is_file():
        raise OptionError(f"there is no GGUF file at {model}")
    return str(path.parent), {"gguf_file": path.name}


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model; raises `OptionError` with the reason of transformers when it cannot be loaded."""
    import transformers

    place, options = source(model)
    with _reasons(model):
        return transformers.AutoTokenizer.from_pretrained(place, **options)


def load_model(model: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A causal language model in training mode, GGUF weights dequantised; raises `OptionError` as above."""
    import transformers

    place, options = source(model)
    with _reasons(model):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **options)
    if getattr(loaded, "hf_quantizer", None) is not None:
        # GGUF weights are plain tensors by now, but transformers would still refuse to save the model
        loaded.hf_quantizer.remove_quantization_config(loaded)
    trained: nn.Module = loaded.to(device).train()
    return trained


@contextmanager
def _reasons(model: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise OptionError(f"model {model!r} could not be loaded: {error}") from error

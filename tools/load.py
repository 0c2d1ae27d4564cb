"""Loads models and tokenizers by name: from a folder, the Hugging Face hub, or a GGUF file."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from chunkft_fx.checkpoints.disk.folders import newest
from chunkft_fx.errors import ChunkFTError, ChunkFTWarning, ModelUnusable, OptionError
from chunkft_fx.tools.changes.vocabulary import fit_embeddings, fitted
from chunkft_fx.tools.data.tokens import check_vocabulary
from chunkft_fx.tools.models.tasks import CLASSES

# What makes a folder a model.
CONFIG = "config.json"
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
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"device {device!r} does not exist; there are {torch.cuda.device_count()}, from cuda:0")
    return chosen


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of the weights; ``"auto"`` is bfloat16 on CUDA and float32 on the CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise OptionError(f"dtype {dtype!r} is not known; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def source(model: str) -> tuple[str, dict[str, str]]:
    """What transformers' ``from_pretrained`` takes for a model: a folder or hub name, and the GGUF file in it.

    Behind ``@`` a hub name has the branch, tag or commit that is taken.
    """
    path = Path(model)
    if path.suffix != ".gguf":
        if not path.exists() and (path.is_absolute() or model.startswith((".", "~"))):
            raise OptionError(f"there is no model at {model}; give a folder, a hub name or a .gguf file")
        if path.is_dir() and not (path / CONFIG).exists():
            raise OptionError(f"the folder {model} holds no model: there is no {CONFIG} in it{_checkpoints(path)}")
        name, _, revision = model.partition("@")
        return (name, {"revision": revision}) if revision and not path.exists() else (model, {})
    if not path.is_file():
        raise OptionError(f"there is no GGUF file at {model}")
    return str(path.parent), {"gguf_file": path.name}


def _checkpoints(path: Path) -> str:
    """What to take of a run that has saved no model yet."""
    found = newest(path)
    return "" if found is None else f", but a checkpoint: give {found}"


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model; raises `ModelUnusable` with the reason of transformers when it cannot be loaded."""
    import transformers

    place, options = source(model)
    with reasons(model):
        return transformers.AutoTokenizer.from_pretrained(place, **options)


def load_config(model: str, changes: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """The config of a model without its weights, or None for a GGUF file, which would have to be read for it.

    Raises `OptionError` for ``changes`` of entries that it does not have.
    """
    import transformers

    place, options = source(model)
    if "gguf_file" in options:
        return None
    with reasons(model):
        config = transformers.AutoConfig.from_pretrained(place, **options)
    for name in changes:
        if not hasattr(config, name):
            near = difflib.get_close_matches(name, config.to_dict(), 1)
            hint = f"; did you mean {near[0]}?" if near else f", whose config is a {type(config).__name__}"
            raise OptionError(f"model-config has {name}, which model {model!r} has not{hint}")
    with reasons(model):
        return transformers.AutoConfig.from_pretrained(place, **options, **changes) if changes else config


def check_config(
    model: str, config: Any, seq_len: int, largest: int | None = None, tokenizer: Any = None, tokens: int = 0
) -> None:
    """Raise `OptionError` for a length that a model of this config has no positions for.

    And `DataError` for data of which the ``largest`` token is one that it has no embeddings for, also once it has been
    given some for so many ``tokens``.
    """
    try:
        text = config.get_text_config()
    except ValueError:  # it has several
        text = config
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < seq_len:
        raise OptionError(
            f"seq-len is {seq_len}, but model {model!r} has positions for {positions} tokens (max_position_embeddings "
            "in its config); lower --seq-len"
        )
    if largest is not None:
        check_vocabulary(largest, tokenizer, fitted(tokens, text.vocab_size))


def load_model(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    task: str = "causal",
    changes: Mapping[str, Any] = MappingProxyType({}),
    tokens: int = 0,
) -> nn.Module:
    """A model for a task in training mode, GGUF weights dequantised; ``changes`` are of its config.

    It gets new embeddings where it has fewer than ``tokens``.

    Raises `ModelUnusable` when it cannot be loaded, with the reason, or when weights are missing or of another
    shape, which transformers would otherwise fill with random values. A classifier's head may be missing.
    """
    import transformers

    place, options = source(model)
    with reasons(model):
        loaded, report = getattr(transformers, CLASSES[task]).from_pretrained(
            place, dtype=dtype, output_loading_info=True, **options, **changes
        )
    _check_report(model, loaded, report, task)
    if getattr(loaded, "hf_quantizer", None) is not None:
        # GGUF weights are plain tensors by now, but transformers would still refuse to save the model
        loaded.hf_quantizer.remove_quantization_config(loaded)
    if tokens:
        fit_embeddings(loaded, tokens)
    trained: nn.Module = loaded.to(device).train()
    return trained


def empty_model(model: str, dtype: torch.dtype, task: str, changes: Mapping[str, Any], tokens: int = 0) -> nn.Module:
    """A model whose weights are not read, and take no memory; otherwise as `load_model` gives it."""
    import transformers

    place, options = source(model)
    with reasons(model), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(place, **options, **changes)
        empty: nn.Module = getattr(transformers, CLASSES[task]).from_config(config, dtype=dtype)
        if tokens:
            fit_embeddings(empty, tokens, draw=False)
    return empty.train()


def _check_report(model: str, loaded: Any, report: Mapping[str, Collection[Any]], task: str) -> None:
    for key, what in (("missing_keys", "has no"), ("mismatched_keys", "has another shape of")):
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in report[key])
        if key == "missing_keys" and task == "classification":
            _say_new([name for name in names if is_new(name, loaded.base_model_prefix)], model)
            names = [name for name in names if not is_new(name, loaded.base_model_prefix)]
        if names:
            raise ModelUnusable(
                f"model {model!r} {what} {_some(names)}, so that a {type(loaded).__name__} would train from random "
                "values; give a folder with all weights of this kind of model"
            )
    if report["error_msgs"]:
        raise ModelUnusable(f"model {model!r} could not be loaded: {_some(sorted(map(str, report['error_msgs'])))}")
    unused = sorted(report["unexpected_keys"])
    # a classifier leaves the head of the model that it is made of
    if unused and task != "classification":
        warnings.warn(
            f"a {type(loaded).__name__} has no place for {_some(unused)} of model {model!r}: not trained, not saved",
            ChunkFTWarning,
            stacklevel=2,
        )


def is_new(name: str, prefix: str) -> bool:
    """Whether a classifier may begin with random values here: in its head, or in the pooler in front of it."""
    return not name.startswith(f"{prefix}.") or ".pooler." in name


def _say_new(names: Sequence[str], model: str) -> None:
    if names:
        warnings.warn(
            f"model {model!r} has no {_some(names)}: the classifier's head begins with random values",
            ChunkFTWarning,
            stacklevel=3,
        )


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


@contextmanager
def reasons(model: str) -> Iterator[None]:
    """Raise `ModelUnusable` for whatever goes wrong while files of a model are read."""
    try:
        yield
    except (ChunkFTError, ModuleNotFoundError, MemoryError):
        raise
    except Exception as error:  # a broken file fails in as many ways as there are formats and libraries
        what = f"model {model!r}" if Path(model).exists() else f"model {model!r}, of which there is no folder here,"
        raise ModelUnusable(f"{what} could not be loaded: {type(error).__name__}: {error}") from error

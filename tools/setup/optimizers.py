"""Finds the optimizer of a run by its name, and checks its options before there is a model."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

import chunkft_fx
from chunkft_fx.errors import OptionError
from chunkft_fx.module.module import CompiledModule

NAMES = {"adamw": chunkft_fx.AdamW, "sgd": chunkft_fx.SGD, "adafactor": chunkft_fx.Adafactor}
# What a run has options of its own for.
OWN = {"model", "params", "lr", "weight_decay", "max_grad_norm", "update", "master", "state_dtype"}


def find(name: str) -> Any:
    """The optimizer of a name, or the class of torch optimizers at a path; this is the one place that knows names."""
    if name in NAMES:
        return NAMES[name]
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        found = None
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise OptionError(
            f"optimizer is {name}; it must be one of {', '.join(NAMES)}, or the path of a class of torch optimizers, "
            "such as torch.optim.NAdam"
        )
    return found


def check_optimizer(name: str, options: Mapping[str, Any], formats: Mapping[str, str], weight_decay: float) -> None:
    """Raise `OptionError` for options that the optimizer of a name does not have.

    ``formats`` are those of its states, ``master`` and ``state_dtype``: only AdamW has a choice of them.
    """
    known = inspect.signature(find(name)).parameters
    for key, value in formats.items():
        if key not in known and value != "float32":
            raise OptionError(f"{key.replace('_', '-')} is {value}, which optimizer {name} has not; leave it out")
    if weight_decay and "weight_decay" not in known:
        raise OptionError(f"weight-decay is {weight_decay}, which optimizer {name} has not; give --weight-decay 0")
    for key in options:
        if key in OWN:
            raise OptionError(f"optimizer-options has {key}, which is an option of the command line: give it there")
        if key not in known:
            others = ", ".join(k for k in known if k not in OWN)
            raise OptionError(f"optimizer-options has {key}, which optimizer {name} has not; it has {others}")


def make_optimizer(
    model: CompiledModule,
    name: str,
    options: Mapping[str, Any],
    formats: Mapping[str, str],
    weight_decay: float,
    **common: Any,
) -> Any:
    """The optimizer over a compiled model; ``common`` is what every optimizer takes."""
    kind = find(name)
    known = inspect.signature(kind).parameters
    chosen: dict[str, Any] = {key: value for key, value in formats.items() if key in known}
    if "weight_decay" in known:
        chosen["weight_decay"] = weight_decay
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    make: Callable[..., Any] = kind if name in NAMES else functools.partial(chunkft_fx.optimizer, kind=kind)
    try:
        return make(model, **common, **chosen, **given)
    except (TypeError, ValueError) as error:
        raise OptionError(f"optimizer {name} with {dict(options)}: {error}") from error

"""Finds the optimizer of a run by its name, and checks its options before there is a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import chunkft_fx
from chunkft_fx.errors import OptionError
from chunkft_fx.module.module import CompiledModule

NAMES = {"adamw": chunkft_fx.AdamW, "sgd": chunkft_fx.SGD, "adafactor": chunkft_fx.Adafactor}
# What a run has options of its own for.
OWN = {"model", "lr", "weight_decay", "max_grad_norm", "update", "master", "state_dtype"}


def find(name: str) -> Callable[..., Any]:
    """The optimizer of a name; this is the one place that knows names."""
    if name not in NAMES:
        raise OptionError(f"optimizer is {name}; it must be one of {', '.join(NAMES)}")
    return NAMES[name]


def check_optimizer(name: str, options: Mapping[str, Any], formats: Mapping[str, str]) -> None:
    """Raise `OptionError` for options that the optimizer of a name does not have.

    ``formats`` are those of its states, ``master`` and ``state_dtype``: only AdamW has a choice of them.
    """
    known = inspect.signature(find(name)).parameters
    for key, value in formats.items():
        if key not in known and value != "float32":
            raise OptionError(f"{key.replace('_', '-')} is {value}, which optimizer {name} has not; leave it out")
    for key in options:
        if key in OWN:
            raise OptionError(f"optimizer-options has {key}, which is an option of the command line: give it there")
        if key not in known:
            others = ", ".join(k for k in known if k not in OWN)
            raise OptionError(f"optimizer-options has {key}, which optimizer {name} has not; it has {others}")


def make_optimizer(
    model: CompiledModule, name: str, options: Mapping[str, Any], formats: Mapping[str, str], **common: Any
) -> Any:
    """The optimizer over a compiled model; ``common`` is what every optimizer takes."""
    kind = find(name)
    known = inspect.signature(kind).parameters
    chosen = {key: value for key, value in formats.items() if key in known}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        return kind(model, **common, **chosen, **given)
    except (TypeError, ValueError) as error:
        raise OptionError(f"optimizer {name} with {dict(options)}: {error}") from error

"""Decides what a row of the table is: a method with its options, written as ``one:chunks=8,beta1=0``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from benchmarks.quality.learner import Learner
from benchmarks.quality.ours import OPTIONS as OURS
from benchmarks.quality.ours import covering_all, covering_one, dense
from benchmarks.quality.peers import adalomo, apollo, badam, galore, lomo, lora

Options = dict[str, Any]
COMMON = frozenset(
    {"steps", "max_grad_norm"}
)  # the first is the loop's: a run of its own length, with its own schedule
ADAM = frozenset({"beta1", "beta2"})


@dataclass(frozen=True)
class Method:
    """How a learner is made of a model, which options that takes, and the rate in the middle of the first three.

    ``package`` is what has to be installed, by the name of its module and that on PyPI.
    """

    make: Callable[[nn.Module, Options], Learner]
    options: frozenset[str]
    rate: float = 1e-3
    package: tuple[str, str] | None = None


METHODS = {
    "dense": Method(dense, ADAM),
    "all": Method(covering_all, OURS),
    "one": Method(covering_one, OURS),
    "badam": Method(badam, frozenset({"interval", "order"}), package=("badam", "badam")),
    "lomo": Method(lomo, frozenset(), 3e-2, ("lomo_optim", "lomo-optim")),
    "adalomo": Method(adalomo, frozenset(), package=("lomo_optim", "lomo-optim")),
    "galore": Method(galore, frozenset({"rank", "gap", "scale"}), package=("galore_torch", "galore-torch")),
    "apollo": Method(apollo, frozenset({"rank", "gap", "scale"}), package=("apollo_torch", "apollo-torch")),
    "lora": Method(lora, frozenset({"rank", "dora"}), package=("peft", "peft")),
}


@dataclass(frozen=True)
class Row:
    """A method and its options; ``text`` is the same for the same row, however it was written."""

    method: str
    options: tuple[tuple[str, Any], ...]

    @property
    def text(self) -> str:
        written = ",".join(
            f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in self.options
        )
        return f"{self.method}:{written}" if written else self.method

    @property
    def missing(self) -> str | None:
        """The package, by its name on PyPI, that this row needs and that is not installed."""
        package = METHODS[self.method].package
        return package[1] if package is not None and importlib.util.find_spec(package[0]) is None else None


def row(text: str) -> Row:
    """Parse a row; ``ValueError`` says what is not known in it. Values are JSON, or else words."""
    method, _, written = text.partition(":")
    if method not in METHODS:
        raise ValueError(f"row {text!r}: method {method!r} is not known; choose one of {', '.join(METHODS)}")
    options = {}
    for part in filter(None, written.split(",")):
        key, is_pair, value = part.partition("=")
        known = METHODS[method].options | COMMON
        if not is_pair or key not in known:
            raise ValueError(f"row {text!r}: {part!r} is no option of {method}; it has {', '.join(sorted(known))}")
        options[key] = _value(value)
    return Row(method, tuple(sorted(options.items())))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def version_of(method: str) -> dict[str, str]:
    """The version of the package that a method needs, by its name on PyPI."""
    package = METHODS[method].package
    if package is None:
        return {}
    is_there = importlib.util.find_spec(package[0]) is not None
    return {package[1]: importlib.metadata.version(package[1]) if is_there else "not installed"}

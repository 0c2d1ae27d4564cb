"""Decides which parameters of a model a run trains, by patterns of their names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from chunkft_fx.errors import OptionError


def freeze(model: nn.Module, frozen: Sequence[str], trained: Sequence[str]) -> list[str]:
    """Leave those parameters as they are that fit a pattern of ``frozen``, or none of ``trained`` if there are any.

    Gives a line that says how many are trained. Raises `OptionError`, with nothing changed, for a pattern that fits no
    parameter, and where nothing would be left to train.
    """
    if not frozen and not trained:
        return []
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):  # a tied one goes by each of its names
        names.setdefault(parameter, []).append(name)
    for option, patterns in (("freeze", frozen), ("train-only", trained)):
        for pattern in patterns:
            _require_fit(option, pattern, [name for same in names.values() for name in same])
    left = [
        parameter
        for parameter, same in names.items()
        if (not trained or _any(trained, same)) and not _any(frozen, same) and parameter.requires_grad
    ]
    if not left:
        asked = " ".join([*(f"--freeze {p}" for p in frozen), *(f"--train-only {p}" for p in trained)])
        raise OptionError(f"{asked} leaves no parameter of this model to train; leave out a part of it")
    for parameter in names:
        parameter.requires_grad_(False)
    for parameter in left:
        parameter.requires_grad_(True)
    count, whole = (sum(p.numel() for p in group) for group in (left, names))
    return [f"{count:,} of {whole:,} parameters are trained ({len(left)} of {len(names)} tensors), the others frozen"]


def fits(pattern: str, name: str) -> bool:
    """Whether a pattern is a run of whole parts of a dotted name: ``layers.1`` is in none of layer 12.

    ``*``, ``?`` and ``[0-3]`` stand for what they do in a shell.
    """
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")


def _any(patterns: Sequence[str], names: Sequence[str]) -> bool:
    return any(fits(pattern, name) for pattern in patterns for name in names)


def _require_fit(option: str, pattern: str, names: Sequence[str]) -> None:
    if any(fits(pattern, name) for name in names):
        return
    known = list(dict.fromkeys(part for name in names for part in _parts(name)))
    near = difflib.get_close_matches(pattern, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known[:12])}"
    raise OptionError(f"{option} is {pattern}, which fits no parameter of this model; {hint}")


def _parts(name: str) -> Iterator[str]:
    """What a name can be found by, without numbers of layers."""
    parts = [part for part in name.split(".") if not re.fullmatch(r"\d+", part)]
    yield from parts[:-1] or parts
    yield name

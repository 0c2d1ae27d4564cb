"""Writes plain data with tensors among it as JSON beside those tensors, and reads it.

What JSON has no form for is an object of one key: ``{"$tuple": [...]}``, ``{"$tensor": NAME}``, ``{"$items": [[key,
value], ...]}`` for a dictionary whose keys are not all strings, or begin with a dollar.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from chunkft_fx.checkpoints.disk.tensor_file import unwritable
from chunkft_fx.errors import OptionError

_TUPLE, _TENSOR, _ITEMS = "$tuple", "$tensor", "$items"


def packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON has it; its tensors are put into ``tensors``, as copies on the CPU.

    Raises `OptionError` for anything else than numbers, strings, None, tensors, and lists, tuples and dictionaries.
    """
    try:
        return _packed(value, name, tensors)
    except RecursionError:
        raise OptionError(f"{name} holds itself, or lies deeper than can be written; give plain data") from None


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        why = unwritable(name, value)
        if why is not None:
            raise OptionError(f"{name} is {why}, and a checkpoint cannot hold it; give a plain tensor")
        tensors[name] = value.detach().cpu().clone()
        return {_TENSOR: name}
    if isinstance(value, list | tuple):
        items = [_packed(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _packed(v, f"{name}.{key}", tensors) for key, v in value.items()}
        pairs = enumerate(value.items())
        return {_ITEMS: [[_packed(part, f"{name}.{i}.{j}", tensors) for j, part in enumerate(p)] for i, p in pairs]}
    raise OptionError(
        f"{name} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold; give "
        "numbers, strings, tensors, and lists, tuples and dictionaries of them"
    )


def unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `packed` was given; raises KeyError where a tensor is missing."""
    if isinstance(value, list):
        return [unpacked(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TENSOR}:
        return tensors[value[_TENSOR]].clone()
    if value.keys() == {_TUPLE}:
        return tuple(unpacked(value[_TUPLE], tensors))
    if value.keys() == {_ITEMS}:
        return {unpacked(k, tensors): unpacked(v, tensors) for k, v in value[_ITEMS]}
    return {key: unpacked(v, tensors) for key, v in value.items()}

"""Checks that a changed config still fits the weights that a model has."""

from __future__ import annotations

from torch import nn

from chunkft_fx.errors import OptionError


def require_same_shapes(before: nn.Module, after: nn.Module, name: str) -> None:
    """Raise `OptionError` for a model whose weights have other shapes, or are others, than before a change."""
    had, has = ({n: tuple(t.shape) for n, t in model.state_dict().items()} for model in (before, after))
    for key in [*had, *has]:
        if had.get(key) != has.get(key):
            raise OptionError(
                f"model-config changes the weights of model {name!r}: {key} is {has.get(key, 'not there')} with it, "
                f"and {had.get(key, 'not there')} without; leave out what says how many weights there are"
            )

"""A module in the place of another: same names, registries, class and attributes, but a call of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


class StandIn(nn.Module):
    """Stands in for ``model``, for ``isinstance`` too; its call is ``run``, with the signature of the model's forward.

    Parameters, buffers and submodules are in the model's own registries, which are shared, not copied. Attributes that
    this module does not have itself are looked up and set on the model.
    """

    _model: nn.Module

    def __init__(self, model: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        own = self.__dict__
        own["_model"] = model  # in the dictionary: nn.Module would register it as a child
        own["forward"] = functools.wraps(model.forward)(run)
        own["_parameters"], own["_buffers"], own["_modules"] = model._parameters, model._buffers, model._modules
        own["_non_persistent_buffers_set"] = model._non_persistent_buffers_set
        own["training"] = model.training

    def __getattr__(self, name: str) -> Any:
        model = self.__dict__.get("_model")
        if model is None:
            raise AttributeError(name)
        return getattr(model, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The model's class, for ``isinstance`` and for code that reads the signature of a model's class."""
        return type(self._model)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set on the model what this module does not have itself."""
        if name in self.__dict__ or hasattr(type(self), name) or "_model" not in self.__dict__:
            super().__setattr__(name, value)
        else:
            setattr(self._model, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            super().__delattr__(name)
        else:
            delattr(self._model, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._model)})

    def train(self, mode: bool = True) -> Any:
        """Set training mode here and in the model."""
        self._model.train(mode)
        self.__dict__["training"] = mode
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or fill them with zeros in place."""
        self._model.zero_grad(set_to_none)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``state_dict``: same keys, shapes and values."""
        return self._model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the model."""
        return self._model.load_state_dict(*args, **kwargs)

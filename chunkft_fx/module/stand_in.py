"""Runs in the place of another module: same names, registries, class and attributes, but a call of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from chunkft_fx.module.model_class import ModelsClass

_STATE_DICT_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# Hooks on the call, which are called around the compiled one.
_CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


# They would make copies of the model, where copies of its stand-in are asked for.
_COPYING = ("__copy__", "__deepcopy__")


class StandIn(nn.Module, metaclass=ModelsClass):
    """Stands in for ``model``, for ``isinstance`` too; its call is ``run``, with the signature of the model's forward.

    Parameters, buffers, submodules and hooks on state dicts are in the model's own registries, which are shared, not
    copied. Attributes that this module does not have itself are looked up and set on the model, and so is its mode.
    Its class has the name and the signature of the model's, but does not inherit from it (`module.model_class`).
    """

    _model: nn.Module
    _run: Callable[..., Any]

    def __init__(self, model: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        own = self.__dict__
        own["_model"] = model  # in the dictionary: nn.Module would register it as a child
        own["_run"] = run
        own["forward"] = functools.wraps(model.forward)(run)
        own["_parameters"], own["_buffers"], own["_modules"] = model._parameters, model._buffers, model._modules
        own["_non_persistent_buffers_set"] = model._non_persistent_buffers_set
        own.update((name, model.__dict__[name]) for name in _STATE_DICT_HOOKS)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The call, where it is asked of the class; a module's own, signed as its model's, is in its dictionary."""
        return self._run(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in _COPYING:
            raise AttributeError(name)
        model = self.__dict__.get("_model")
        if model is None:
            raise AttributeError(name)
        return getattr(model, name)

    @property
    def __class__(self) -> type:
        """The model's class, for ``isinstance`` and for code that reads the signature of a model's class."""
        return type(self._model)

    @__class__.setter
    def __class__(self, kind: type) -> None:
        """Give the model another class, as a parametrization of one of its own parameters does."""
        self._model.__class__ = kind

    @property
    def training(self) -> bool:
        """The model's mode, also where that was set on the model itself."""
        return self._model.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_model" in self.__dict__:  # nn.Module sets it before there is a model
            self._model.training = mode

    def __setattr__(self, name: str, value: Any) -> None:
        """Set on the model what this module does not have itself."""
        if name in self.__dict__ or type(self).has(name) or "_model" not in self.__dict__:
            super().__setattr__(name, value)
        else:
            setattr(self._model, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            super().__delattr__(name)
        else:
            delattr(self._model, name)

    def __getitem__(self, key: Any) -> Any:
        model: Any = self._model
        return model[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        model: Any = self._model
        model[key] = value

    def __delitem__(self, key: Any) -> None:
        model: Any = self._model
        del model[key]

    def __len__(self) -> int:
        model: Any = self._model
        return len(model)

    def __iter__(self) -> Iterator[Any]:
        model: Any = self._model
        return iter(model)

    def __contains__(self, key: Any) -> bool:
        model: Any = self._model
        return key in model

    def __bool__(self) -> bool:
        return bool(self._model)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._model)})

    def train(self, mode: bool = True) -> Any:
        """Set training mode here and in the model."""
        self._model.train(mode)
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

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """The model's own way of loading, when a module that holds this one loads."""
        self._model._load_from_state_dict(*args, **kwargs)

    @property
    def _call_hooks(self) -> dict[str, Any]:
        """The hooks on this module's call, by the registry that they are in; those that are there."""
        return {name: held for name in _CALL_HOOKS if (held := self.__dict__[name])}

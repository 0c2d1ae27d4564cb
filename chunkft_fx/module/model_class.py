"""Makes the class of a module that stands in for a model: called, documented and signed as the model's class.

It does not inherit from the model's class. Methods and properties of that class belong to the wrapped model, which
attribute access leads to; inherited, they would be found before it and run on the stand-in. Nor does a model's class
hear of it (``__init_subclass__``, a metaclass that keeps a registry), or have a say in whether it can be made.
``isinstance`` goes by ``__class__`` of the instance, which `StandIn` gives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

_OF = "_model_class"


class ModelsClass(type):
    """Classes of stand-ins; an instance is made of the one that belongs to its model's class.

    Class attributes that a stand-in does not have itself are those of the model's class.
    """

    def __call__(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        kind = cls if _OF in cls.__dict__ else _kind(cls, type(model))
        return type.__call__(kind, model, *args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        # Python looks its own protocols up on classes (__copy__, __abstractmethods__): those are not handed on.
        if _OF not in cls.__dict__ or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")
        return getattr(cls.__dict__[_OF], name)

    def __repr__(cls) -> str:
        if _OF not in cls.__dict__:
            return super().__repr__()
        return f"<{cls.__mro__[1].__name__} of {cls.__dict__[_OF]!r}>"

    def has(cls, name: str) -> bool:
        """Whether stand-ins have this attribute themselves, and not from the model's class."""
        return any(name in kind.__dict__ for kind in cls.__mro__)


# Values are weak, and hold their keys: models whose classes are made one by one (fx.GraphModule) are let go with them.
_KINDS: WeakValueDictionary[tuple[type, type], ModelsClass] = WeakValueDictionary()


def _kind(base: ModelsClass, model_class: type) -> ModelsClass:
    """The class of stand-ins for models of a class, the same one for all of them."""
    known = _KINDS.get((base, model_class))
    if known is not None:
        return known
    body = {
        _OF: model_class,
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
        "__doc__": model_class.__doc__,
        "forward": _signed(base, model_class),
    }
    return _KINDS.setdefault((base, model_class), ModelsClass(model_class.__name__, (base,), body))


def _signed(base: Any, model_class: Any) -> Callable[..., Any]:
    """The forward of stand-ins with the signature of the models'."""

    @functools.wraps(model_class.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, *args, **kwargs)

    return forward

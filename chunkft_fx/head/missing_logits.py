"""Defines the object that training returns in place of logits that were never held whole; it says how to get them.

Code that only passes it on (in a tuple, a dictionary, a ``ModelOutput``, a pickle, to another device) works as before.
Code that reads it is told what to change, instead of finding ``None`` somewhere later.
"""

from __future__ import annotations

from typing import Any, NoReturn, Self

from chunkft_fx.errors import LogitsNotKept


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise LogitsNotKept(
        "training does not keep the logits of a model whose loss needs nothing else of them, so there is nothing to "
        "read here; pass return_logits=True to chunkft_fx.compile to have them (they take memory), or call the model "
        "in evaluation mode or under torch.no_grad()"
    )


class MissingLogits:
    """Stands for logits in what a model returns in training. It is false, and raises `LogitsNotKept` on any use."""

    __slots__ = ()

    def detach(self) -> Self:
        """Itself, as are its copies on other devices: moving a model's outputs moves nothing here."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Itself."""
        return self

    cpu = cuda = detach

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "MissingLogits(return_logits=False)"

    def __eq__(self, other: object) -> bool:
        if other is None or isinstance(other, MissingLogits):
            return other is not None
        return _refuse()

    def __hash__(self) -> int:
        return hash(MissingLogits)

    def __reduce__(self) -> tuple[type[MissingLogits], tuple[()]]:
        return MissingLogits, ()

    def __getattr__(self, name: str) -> Any:
        # what looks for protocols (copy, pickle, numpy) must hear that they are not there
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return _refuse()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        _refuse()

    __getitem__ = __setitem__ = __len__ = __iter__ = __contains__ = __call__ = _refuse
    __array__ = __float__ = __int__ = __index__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __matmul__ = __rmatmul__ = _refuse
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __neg__ = __abs__ = __invert__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse

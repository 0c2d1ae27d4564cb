"""Runs a model's methods that call the model, such as ``generate``, with the compiled call for its forward.

They are bound to the wrapped model, whose own forward would read streamed weights where they lie. Only while such a
method runs does the model's ``forward`` lead to the compiled call, and there back to the model's own for tracing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from chunkft_fx.copies.residency import Residency
from chunkft_fx.errors import OptionError


@contextmanager
def routed(model: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """While inside, ``model(...)`` runs ``call``; within that call it is the plain model again."""
    own = {"forward": model.__dict__["forward"]} if "forward" in model.__dict__ else {}

    def as_before() -> None:
        model.__dict__.pop("forward", None)
        model.__dict__.update(own)

    @functools.wraps(model.forward)  # generate reads the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        as_before()
        try:
            return call(*args, **kwargs)
        finally:
            model.__dict__["forward"] = forward

    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        as_before()


def through_compiled(
    method: Callable[..., Any],
    model: nn.Module,
    call: Callable[..., Any],
    residency: Residency,
    lock: AbstractContextManager[Any],
) -> Callable[..., Any]:
    """A model's method, in which calls of the model are compiled ones as long as weights have to be fetched.

    With every weight on the device the plain model does: it is captured for no new length, and no slower. Raises
    `OptionError` for an encoder-decoder on CUDA, which calls its encoder by itself, past the compiled call.
    """

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not residency.away():
            return method(*args, **kwargs)
        if residency.device.type == "cuda" and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise OptionError(
                f"{type(model).__name__}.{method.__name__} calls its encoder itself, whose weights are in host memory: "
                "raise the budget until the plan streams none, or move the plain model to the CPU and call it there"
            )
        with lock, routed(model, call):
            return method(*args, **kwargs)

    return run

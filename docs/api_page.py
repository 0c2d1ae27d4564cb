"""Writes the API page from signatures and docstrings: what users call, and what their calls return.

``python -m docs.api_page`` writes ``docs/api.md`` (``make docs`` does); `page` gives its text.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

import chunkft_fx
from chunkft_fx import errors
from chunkft_fx.gradients.slice_gradient import SliceGradient
from chunkft_fx.gradients.slices import ActiveSlice
from chunkft_fx.gradients.used import UsedGradient
from chunkft_fx.gradients.waiting import WaitingGradient
from chunkft_fx.head.missing_logits import MissingLogits
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.optim.optimizer import ChunkedOptimizer
from chunkft_fx.plan.policy import Policy
from chunkft_fx.plan.table import Considered

PAGE = Path(__file__).with_name("api.md")
# What users get without making it. Of classes that also serve the library, the members that are for users.
GIVEN: dict[type, tuple[str, ...] | None] = {
    CompiledModule: None,
    ChunkedOptimizer: (),
    Policy: (),
    Considered: (),
    ActiveSlice: ("grad", "weight"),
    SliceGradient: ("part",),
    WaitingGradient: (),
    UsedGradient: (),
    MissingLogits: (),
}
# What torch calls.
OF_TORCH = ("extra_repr",)
OF_OPTIMIZERS = ("step", "zero_grad", "state_dict", "load_state_dict")
WIDTH = 100


class _Text:
    """An annotation as it was written, which is what a signature shows."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def page() -> str:
    """The whole page as Markdown."""
    public = {name: getattr(chunkft_fx, name) for name in chunkft_fx.__all__ if name != "errors"}
    made = {name: thing for name, thing in public.items() if thing not in GIVEN}
    parts = ["# API", "Made from the docstrings by `make docs`: change those, not this page."]
    parts += ["What users call is in `chunkft_fx`; all other modules are internal and may change in any version."]
    for name, thing in sorted(made.items(), key=lambda item: inspect.isclass(item[1])):
        parts += [f"## chunkft_fx.{name}", _signature(name, thing), *_described(thing)]
    parts.append("# What calls return")
    for kind in GIVEN:
        parts += [f"## {kind.__name__}", *_fields(kind), *_described(kind)]
    parts += ["# Errors", "All are in `chunkft_fx.errors`; [troubleshooting](troubleshooting.md) says what to do."]
    for name, error in error_classes().items():
        parts += [f"**`{name}`** ({', '.join(base.__name__ for base in error.__bases__)})", _doc(error)]
    return "\n\n".join(parts) + "\n"


def error_classes() -> dict[str, type]:
    """The classes of `chunkft_fx.errors` by name, in the order of the file."""
    return {n: c for n, c in vars(errors).items() if inspect.isclass(c) and c.__module__ == errors.__name__}


def _fields(kind: type) -> Iterator[str]:
    """The signature of a frozen record, which names its fields."""
    if dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        yield _signature(kind.__name__, kind)


def _described(thing: Any) -> Iterator[str]:
    """The docstring of a function or class, then its members with theirs."""
    yield _doc(thing)
    if not inspect.isclass(thing):
        return
    for name, member in _members(thing):
        if isinstance(member, property):
            assert member.fget is not None
            yield f"### {thing.__name__}.{name}"
            yield f"A property: `{inspect.signature(member.fget).return_annotation}`."
        else:
            yield f"### {thing.__name__}.{name}()"
            yield _signature(name, member)
        yield _doc(member)


def _members(kind: type) -> list[tuple[str, Any]]:
    """The documented members that users call: not those that torch defines, or calls."""
    named = GIVEN.get(kind)
    if named is not None:
        return [(name, inspect.getattr_static(kind, name)) for name in named]
    ours = [c for c in kind.__mro__ if c is kind or (_is_ours(c) and not issubclass(c, nn.Module))]
    own = {n: m for c in ours for n, m in vars(c).items() if isinstance(m, property) or inspect.isfunction(m)}
    if issubclass(kind, Optimizer):
        found = {n: inspect.getattr_static(kind, n) for n in OF_OPTIMIZERS}
        return [(n, m) for n, m in found.items() if _is_ours(m)]
    return [(n, m) for n, m in own.items() if not n.startswith("_") and n not in OF_TORCH and m.__doc__]


def _is_ours(thing: Any) -> bool:
    return bool(thing.__module__.startswith("chunkft_fx"))


def _signature(name: str, thing: Callable[..., Any]) -> str:
    """A signature as Python code, without ``self``; a parameter a line where it is long."""
    signature = inspect.signature(thing)
    shown = [
        p.replace(annotation=_Text(p.annotation)) if isinstance(p.annotation, str) else p
        for p in signature.parameters.values()
        if p.name != "self"
    ]
    returns = signature.return_annotation
    signature = signature.replace(parameters=shown, return_annotation=inspect.Signature.empty)
    end = "" if inspect.isclass(thing) else f" -> {returns}"
    line = f"{name}{signature}{end}"
    if len(line) > WIDTH:
        named = [str(p) for p in shown if p.kind is p.KEYWORD_ONLY]
        usual = [str(p) for p in shown if p.kind is not p.KEYWORD_ONLY]
        each = usual + (["*", *named] if named else [])
        line = f"{name}(\n" + "".join(f"    {p},\n" for p in each) + f"){end}"
    return f"```python\n{line}\n```"


def _doc(thing: Any) -> str:
    """A docstring as Markdown."""
    return re.sub(r"``(.+?)``", r"`\1`", inspect.cleandoc(thing.__doc__ or ""), flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page())

"""Decides how a class is run over a model's slices, from what it does with parameters like the model's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chunkft_fx.errors import OptimizerNotSupported
from chunkft_fx.optim.classes.parked import OptimizerClass
from chunkft_fx.optim.classes.probe import (
    MASTER_NBYTES,
    Findings,
    Kept,
    find,
    moved_nbytes,
    require_closureless,
    writes_gradients,
)
from chunkft_fx.optim.states.numbers import Number
from chunkft_fx.plan.state_spec import CODES, MASTER, REMAINDER, SCALES, StateTensor, master_dtype

# A kind of parameter: its number of dimensions, and the dtype of its master.
Form = tuple[int, torch.dtype]
EIGHT_BITS = 'for states in 8 bits use chunkft_fx.AdamW(model, state_dtype="8bit"), which has the codes of torchao'
ANOTHER = "use another class"
FREEZE = (
    "freeze such parameters (requires_grad_(False) before chunkft_fx.compile), use another class, or one of your own "
    "that hands them to another (docs/limits.md has one for Muon)"
)


@dataclass(frozen=True)
class Derived:
    """A class as it is run: the states and numbers it keeps, whether it needs whole parameters and spoils gradients.

    ``numbers`` are by the number of dimensions of a parameter. ``moved_nbytes`` is what an update of an element moves
    in memory, its master included.
    """

    tensors: tuple[StateTensor, ...]
    numbers: Mapping[int, tuple[Number, ...]]
    is_whole: bool
    spoils_gradients: bool
    moved_nbytes: int


def forms_of(named: Iterable[tuple[str, Tensor]]) -> dict[Form, tuple[str, Tensor]]:
    """The kinds of parameters that there are, each with an example."""
    found: dict[Form, tuple[str, Tensor]] = {}
    for name, p in named:
        found.setdefault((p.ndim, master_dtype(p)), (name, p))
    return found


def derive(kind: OptimizerClass, options: Mapping[str, Any], forms: Mapping[Form, tuple[str, Tensor]]) -> Derived:
    """How a class with a group's options is run over parameters of these forms.

    Raises `OptimizerNotSupported`, before anything of the user's changes, if that cannot be right.
    """
    try:
        require_closureless(kind)
    except OptimizerNotSupported as error:
        raise OptimizerNotSupported(f"{kind.name} cannot be run over slices: {error}; use another class") from error
    options = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in options.items()}
    found: dict[Form, Findings] = {}
    refused: list[tuple[Form, Exception]] = []
    for form in forms:
        try:
            found[form] = find(kind, options, *form)
        except Exception as error:  # whatever a class raises
            refused.append((form, error))
    if refused:
        form, why = refused[0]
        raise OptimizerNotSupported(_refusal(kind, *forms[form], why, is_all=not found)) from why
    known = found | _beside(kind, options, found)
    names = _names(known)
    tensors = tuple(_tensor(kind, name, known, forms) for name in names)
    numbers = {
        d: tuple(n for n in findings.numbers.values() if n.name not in names) for (d, _), findings in found.items()
    }
    dimensions, dtype = next((f for f in found if f[0]), next(iter(found)))
    return Derived(
        tensors,
        numbers,
        any(findings.is_whole for findings in found.values()),
        writes_gradients(kind, options, dimensions, dtype),
        moved_nbytes(kind, options, dimensions) + MASTER_NBYTES,
    )


def _refusal(kind: OptimizerClass, name: str, example: Tensor, error: Exception, is_all: bool) -> str:
    """Why a class cannot train a parameter, and what to change; ``is_all`` if it can train none."""
    is_8_bit = kind.kind.__module__.startswith(("torchao.", "bitsandbytes."))
    hint = EIGHT_BITS if is_8_bit else ANOTHER if is_all else FREEZE
    said = f": {error}"
    if not isinstance(error, OptimizerNotSupported):
        said = f": its step on a parameter with as many dimensions raised {type(error).__name__}: {error}"
    return f"{kind.name} cannot train {name!r} of shape {list(example.shape)}{said.rstrip('.')}; {hint}"


def _beside(kind: OptimizerClass, options: Mapping[str, Any], found: Mapping[Form, Findings]) -> dict[Form, Findings]:
    """What the class keeps of vectors and matrices, if it takes them: a scalar's states look like numbers."""
    more: dict[Form, Findings] = {}
    dtype = next(iter(found))[1]
    for dimensions in (1, 2) if any(d == 0 for d, _ in found) else ():
        with contextlib.suppress(Exception):  # the model has no such parameter
            more[dimensions, dtype] = found.get((dimensions, dtype)) or find(kind, options, dimensions, dtype)
    return more


def _names(known: Mapping[Form, Findings]) -> list[str]:
    return list(dict.fromkeys(name for findings in known.values() for name in findings.tensors))


def _tensor(
    kind: OptimizerClass, name: str, known: Mapping[Form, Findings], forms: Mapping[Form, tuple[str, Tensor]]
) -> StateTensor:
    """A state as the spec has it. Raises `OptimizerNotSupported` where parameters differ in more than it can say."""
    if name in (MASTER, REMAINDER, "slice_steps", "step") or name.endswith((CODES, SCALES)):
        raise OptimizerNotSupported(f"{kind.name} keeps a state {name!r}, a name that chunkft_fx uses for its own")
    kept: dict[Form, Kept] = {}
    for form, findings in known.items():
        if name in findings.tensors:
            kept[form] = findings.tensors[name]
        elif form[0] == 0 and name in findings.numbers:
            kept[form] = Kept(getattr(torch, findings.numbers[name].kind, torch.bool), None)
    with_it, without = {d for d, _ in kept}, {d for d, _ in known} - {d for d, _ in kept}
    of = "all" if not without else "matrices" if max(without) < 2 else "vectors"
    has_split = any(d < 2 for d in with_it) if of == "matrices" else of == "vectors" and any(d > 1 for d in with_it)
    dtypes = {dtype: k.dtype for (_, dtype), k in kept.items()}
    narrow = dtypes.get(torch.float32, torch.float32)
    is_even = all(k.dtype == dtypes[form[1]] for form, k in kept.items())
    is_known = narrow in (torch.float32, torch.bfloat16) and dtypes.get(torch.float64, torch.float64) == torch.float64
    if has_split or len({k.mean_over for k in kept.values()}) > 1 or not is_even or not is_known:
        shapes = ", ".join(f"{n!r} of shape {list(p.shape)}" for n, p in forms.values())
        raise OptimizerNotSupported(
            f"{kind.name} keeps its state {name!r} in another form or dtype for each of {shapes}, or in {narrow}, and "
            f"states can be float32 or bfloat16 and alike for all vectors and for all matrices; {FREEZE}"
        )
    (mean_over,) = {k.mean_over for k in kept.values()}
    return StateTensor(name, str(narrow).removeprefix("torch."), of, mean_over)

"""Runs private torch interfaces on symbolic sizes behind typed functions: all that the library asks of such sizes."""

from __future__ import annotations

import functools
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_symbols, free_unbacked_symbols, statically_known_true
from torch.utils._sympy.functions import FloorDiv, Max, Min

# What a size counts as that depends on data and that torch knows no bound of.
UNBOUNDED = 8192


def hint(size: int | torch.SymInt) -> int:
    """A size as a plain number: a symbolic one stands for the value it was traced with.

    A size that depends on data has no such value; it stands for the largest that it can have (all elements of a mask
    are set), and where torch knows no bound for `UNBOUNDED`.
    """
    if isinstance(size, int):
        return size
    if size.node.hint is not None:
        return int(size.node.hint)
    ranges, expression = size.node.shape_env, size.node.expr
    # torch 2.13 calls it so, and warns of the older name
    values = ranges.backed_var_to_val if hasattr(ranges, "backed_var_to_val") else ranges.var_to_val
    known = {s: values[s] if s in values else _largest(ranges.var_to_range.get(s)) for s in expression.free_symbols}
    return int(expression.subs(known))


def _largest(interval: Any) -> int:
    upper = None if interval is None else interval.upper
    return int(upper) if upper is not None and upper.is_Integer and upper < torch.iinfo(torch.int64).max else UNBOUNDED


def may_vary(tensor: Tensor, dim: int) -> None:
    """Have what is traced with a tensor hold for other sizes along ``dim`` too, if the model allows it."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def is_known_true(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on symbolic sizes always holds, as far as is known without adding a guard to the trace."""
    return statically_known_true(condition)


def size_symbol(size: Any) -> str | None:
    """The name of the symbol that a size is; None for a number, and for anything computed from symbols."""
    expression = size.node.expr if isinstance(size, torch.SymInt) else None
    return expression.name if isinstance(expression, sympy.Symbol) else None


def depends_on_data(size: int | torch.SymInt) -> bool:
    """Whether a size follows from values of tensors, so that no call's shapes tell it."""
    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))


def substituted(size: torch.SymInt, values: tuple[tuple[str, int], ...]) -> int | None:
    """The value of a symbolic size where symbols have these values, by name; None if one has none."""
    return _substituted(size.node.expr, values)


@functools.lru_cache(maxsize=2**16)
def _substituted(expression: Any, values: tuple[tuple[str, int], ...]) -> int | None:
    known = dict(values)
    symbols = expression.free_symbols
    if any(s.name not in known for s in symbols):
        return None
    return int(expression.xreplace({s: sympy.Integer(known[s.name]) for s in symbols}))


def falls_with(size: torch.SymInt) -> frozenset[str]:
    """The names of the symbols that a size may fall with: none of a product or a sum of symbols, all where in doubt."""
    expression = size.node.expr
    return frozenset() if _never_falls(expression) else frozenset(s.name for s in expression.free_symbols)


@functools.lru_cache(maxsize=2**16)
def _never_falls(expression: Any) -> bool:
    """Whether an expression of sizes, which are never negative, falls with none of them."""
    if expression.is_Integer or isinstance(expression, sympy.Symbol):
        return True
    parts = expression.args
    if isinstance(expression, sympy.Mul):
        return all(_never_falls(p) and not p.is_negative for p in parts)
    if isinstance(expression, FloorDiv):
        return _never_falls(parts[0]) and bool(parts[1].is_Integer and parts[1] > 0)
    if isinstance(expression, sympy.Pow):
        return _never_falls(parts[0]) and bool(parts[1].is_Integer and parts[1] >= 0)
    return isinstance(expression, (sympy.Add, Max, Min)) and all(map(_never_falls, parts))


def symbols(value: Any) -> set[str]:
    """Names of the symbolic sizes in a fake value."""
    return {s.name for s in free_symbols(value)} if isinstance(value, (Tensor, torch.SymInt)) else set()

"""Runs a model through Dynamo, which hands each graph that it traces to a backend of ours.

Every compiled model is traced in a code object of its own. Dynamo keeps what it compiled with the code object, counts
recompilations against a limit there, and notes there which sizes have changed. If it traced the ``forward`` of the
class itself, all models of that class would share these, also with models that are long gone.
"""

from __future__ import annotations

import builtins
import contextlib
import itertools
import logging
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import pgo
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException, Unsupported
from torch._dynamo.guards import CheckFunctionManager
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

from chunkft_fx.capture.transformers_hooks import make_hooks_traceable
from chunkft_fx.capture.user_code import where_in
from chunkft_fx.errors import ChunkFTError, UnsupportedGraph
from chunkft_fx.machine.garbage import COLLECTOR
from chunkft_fx.torch_internals import untraced_because

Backend = Callable[[fx.GraphModule, list[Any]], Any]

# Models differ in batches and modes as often as their users want. Each graph costs seconds, which they see.
_NO_LIMIT = 2**31 - 1
_numbers = itertools.count()


def trace(model: nn.Module, backend: Backend) -> Callable[..., Any]:
    """``torch.compile(model, fullgraph=True)`` with our backend; its failures become `UnsupportedGraph`."""
    function = _of_its_own(model)
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    settings = _settings()
    is_first = True  # of the calls, nearly always the only one that is traced

    def traced(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_first
        less_often = COLLECTOR.seldom() if is_first else contextlib.nullcontext()
        is_first = False
        with less_often, _quiet_metrics(), torch._dynamo.config.patch(settings):
            try:
                return compiled(*args, **kwargs)
            except Unsupported:
                if not make_hooks_traceable(model):
                    raise
            return compiled(*args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        reason = untraced_because()
        if reason is not None:
            raise UnsupportedGraph(
                f"{reason} is in effect, under which torch runs the plain model instead of the compiled one; call the "
                "compiled module outside of it, or the plain model inside"
            )
        try:
            return traced(*args, **kwargs)
        except BackendCompilerFailed as error:
            inner = error.inner_exception
            if isinstance(inner, (ChunkFTError, torch.OutOfMemoryError)):
                raise inner from None
            raise UnsupportedGraph(
                f"this model could not be compiled{where_in(str(inner))}: {type(inner).__name__}: {inner}"
            ) from error
        except (TorchDynamoException, GuardOnDataDependentSymNode, ConstraintViolationError) as error:
            raise UnsupportedGraph(
                f"this model cannot be captured as one graph{where_in(str(error))}; change its code, so that "
                f"torch.compile(fullgraph=True) can trace it.\n{error}"
            ) from error

    weakref.finalize(call, _forget, backend, function.__code__).atexit = False
    return call


def _of_its_own(model: nn.Module) -> types.FunctionType:
    """A function that calls the model, and shares its code object and its globals with no other.

    Dynamo puts what it compiled among the globals of the traced function.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # Dynamo remembers which sizes changed by file, line and name
    code = forward.__code__.replace(co_name=f"forward_{next(_numbers)}")
    own = {"__name__": __name__, "__builtins__": builtins}
    return types.FunctionType(code, own, code.co_name, None, forward.__closure__)


def _forget(backend: Backend, code: types.CodeType) -> None:
    """Let go of a model that is gone: by itself Dynamo keeps what it compiled, and all backends, as long as it runs."""
    _drop_watchers(code)
    torch._dynamo.eval_frame.remove_from_cache(code)
    sizes: dict[Any, Any] = pgo._CODE_STATE or {}
    for place in [p for p in sizes if (p.filename, p.name) == (code.co_filename, code.co_name)]:
        sizes.pop(place, None)
    known = torch._dynamo.eval_frame.cached_backends
    for key in [k for k, b in known.items() if b is backend or getattr(b, "compiler_fn", None) is backend]:
        known.pop(key, None)


def _drop_watchers(code: types.CodeType) -> None:
    """Take away the finalizers that would invalidate what was compiled for a code object.

    Dynamo puts one on every class and function that guards know by identity. Those live as long as the process, and
    each finalizer holds all guards of a compilation.
    """
    guards = [e.guard_manager for e in torch._dynamo.eval_frame._debug_get_cache_entry_list(code)]
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        found = finalizer.peek()
        invalidate = getattr(found[1], "func", None) if found else None
        watcher = getattr(invalidate, "__self__", None)
        if isinstance(watcher, CheckFunctionManager) and any(
            getattr(watcher, "guard_manager", None) is g for g in guards
        ):
            finalizer.detach()


def _settings() -> dict[str, Any]:
    config = torch._dynamo.config
    # Some transformers models log inside forward, which would break the graph. One function only:
    # torch 2.11 sorts this set when it records metrics, and functions have no order.
    option = "ignore_logging_functions" if hasattr(config, "ignore_logging_functions") else "ignore_logger_methods"
    ignored = set(getattr(config, option))
    warning_once = getattr(logging.Logger, "warning_once", None)
    if warning_once is not None:
        ignored.add(warning_once)
    limits = {"recompile_limit": _NO_LIMIT, "accumulated_recompile_limit": _NO_LIMIT}
    # By default Dynamo assumes that nobody adds hooks to a module after it was traced, and would leave them out.
    return {option: ignored, "skip_nnmodule_hook_guards": False, **limits}


@contextlib.contextmanager
def _quiet_metrics() -> Iterator[None]:
    """torch 2.11 cannot write its metrics down with such settings, and logs that as an error with each compilation."""
    metrics = logging.getLogger("torch._dynamo.metrics_context")
    metrics.addFilter(_drop)
    try:
        yield
    finally:
        metrics.removeFilter(_drop)


def _drop(record: logging.LogRecord) -> bool:
    return False

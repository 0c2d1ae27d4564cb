"""Runs several calls of a model as one step: their arguments are gathered, the step runs, each call gets its outputs.

What lies between a call's arguments and the inputs of a traced graph, and between its outputs and what the call
returns, is Dynamo's. So each call is made twice: the first time it ends where the graph would run and leaves its inputs
here, the second time it finds its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from chunkft_fx.capture.capture import Capture
from chunkft_fx.errors import OptionError, UnsupportedGraph
from chunkft_fx.planning.example_batch import arguments_of
from chunkft_fx.runtime.session import Session
from chunkft_fx.torch_internals import tree_flatten

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Gathered(BaseException):
    """Ends a call that was to leave the inputs of its graph, and nothing else."""


class MicroBatches:
    """The calls of one step, in order, between their first and their second time."""

    def __init__(self) -> None:
        self._sessions: list[Session] = []
        self._inputs: list[tuple[Any, ...]] = []
        self._outputs: list[tuple[Any, ...]] | None = None

    def run(self, call: Callable[..., Any], batches: Sequence[Arguments]) -> list[Any]:
        """Make the calls, which end in `met`; returns what each returns.

        Raises `UnsupportedGraph` where they are not calls of one graph.
        """
        for args, kwargs in batches:
            try:
                call(*args, **kwargs)
            except _Gathered:
                continue
            raise AssertionError("a call that was to be gathered came to an end")
        first = self._sessions[0]
        if any(session is not first for session in self._sessions):
            raise _differs()
        self._outputs = first.accumulated(self._inputs)
        return [call(*args, **kwargs) for args, kwargs in batches]

    def met(self, session: Session, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a call does where its graph would run; returns the flat outputs."""
        if self._outputs is None:
            self._sessions.append(session)
            self._inputs.append(inputs)
            raise _Gathered
        known = self._inputs[-len(self._outputs)]
        # a first call may leave Python state that later ones are traced anew for, such as a setting that it completes
        is_same = session is self._sessions[0] or computes_the_same(session.capture, self._sessions[0].capture)
        # what the forward writes is no longer what it was when the arguments were gathered
        written = {primal for primal, _ in session.capture.mutations}
        read = [primal not in written for primal in session.capture.primals]
        if not is_same or not all(map(is_same_input, compress(inputs, read), compress(known, read))):
            raise _differs()
        return self._outputs.pop(0)


def micro_batches(given: Sequence[Any]) -> list[Arguments]:
    """The arguments of each call; `OptionError` unless there are any, and they are alike but for values of tensors."""
    if not isinstance(given, (list, tuple)) or not given:
        raise OptionError(
            "accumulate needs a list of micro-batches, at least one, each the arguments of one call: a dict of keyword "
            f"arguments or a tuple of positional ones; it was given {_kind(given)}"
        )
    batches = [arguments_of(batch) for batch in given]
    leaves, structure = tree_flatten(batches[0])
    for n, batch in enumerate(batches[1:], 1):
        others, other_structure = tree_flatten(batch)
        if other_structure != structure:
            raise OptionError(f"micro-batch {n} has other arguments than micro-batch 0; give all of them the same")
        for a, b in zip(leaves, others, strict=True):
            if _look(a) != _look(b):
                raise OptionError(
                    f"micro-batch {n} has {_look(b)} where micro-batch 0 has {_look(a)}; give all micro-batches of a "
                    "step the same shapes, dtypes and options: pad the shorter ones, and leave what is padded out of "
                    "the loss (label -100), or run them one after the other, inside no_sync() up to the last"
                )
    return batches


def _kind(given: Any) -> str:
    name = type(given).__name__
    return f"an empty {name}" if isinstance(given, (list, tuple)) else f"a {name}"


def _look(leaf: Any) -> Any:
    """What micro-batches must have in common of an argument."""
    if not isinstance(leaf, Tensor):
        return leaf
    return f"a tensor {list(leaf.shape)} of {leaf.dtype} on {leaf.device}, strides {leaf.stride()}"


def computes_the_same(one: Capture, other: Capture) -> bool:
    """Whether two captures are the same graph, node by node, of the same inputs and outputs."""
    if one.constants.keys() != other.constants.keys() or str(one.graph) != str(other.graph):
        return False
    if not all(map(is_same_input, one.constants.values(), other.constants.values())):
        return False
    names = "primals", "parameters", "outputs", "mutations", "gradients", "tangents", "effects"
    return all(getattr(one, name) == getattr(other, name) for name in names)


def is_same_input(one: Any, other: Any) -> bool:
    """Whether an input of a graph has stayed what it was; a number can come as a new tensor each time."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.numel() == 1 and one.device == other.device and torch.equal(one, other))
    return bool(one == other)


def _differs() -> UnsupportedGraph:
    return UnsupportedGraph(
        "the calls of these micro-batches are traced as different graphs, because the model's forward depends on more "
        "than its tensors: on Python state that a call changes, or on sizes that were specialised; run them one after "
        "the other, inside no_sync() up to the last"
    )

"""Says where in the user's code a node of a trace, or an error of torch's, comes from, for messages."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import fx

from chunkft_fx.errors import ChunkFTError, UnsupportedGraph

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n(?!\s*File ")[^\S\n]*([^\n]*)')
# Whose frames say nothing to users: torch's, and this package's.
_OTHERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def where(node: fx.Node) -> str:
    """`` (file, line n: code)`` of the user's line that a node was traced from, or nothing.

    Of an input, which no line makes, it is the first line that reads it.
    """
    for traced in (node, *node.users):
        place = where_in(traced.meta.get("stack_trace") or "")
        if place:
            return place
    return ""


def where_in(text: str) -> str:
    """`` (file, line n: code)`` of the innermost line outside torch in a text with stack frames, or nothing.

    ``text`` is what torch records with a node, or the message of an error that it raised while tracing.
    """
    frames = [found for found in _FRAME.findall(text) if not found[0].startswith(_OTHERS)]
    if not frames:
        return ""
    file, line, code = frames[-1]
    return f" ({file}, line {line}: {code.strip()})"


@contextlib.contextmanager
def naming_the_forward_line() -> Iterator[None]:
    """Turn a failure to trace a backward pass into `UnsupportedGraph` with the line of forward that it belongs to.

    torch tells that line in a warning before it raises the error. All other warnings are given on as they are.
    """
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        try:
            yield
        except (ChunkFTError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            place = where_in("\n".join(str(warning.message) for warning in given))
            if not place:
                raise
            raise UnsupportedGraph(
                f"the backward pass of this line cannot be traced{place}: {type(error).__name__}: {error}"
            ) from error
    for warning in given:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

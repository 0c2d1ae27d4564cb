"""Where in the user's code a node of a trace comes from, for messages."""

from __future__ import annotations

import re

from torch import fx


def where(node: fx.Node) -> str:
    """`` (file, line n: code)`` of the innermost line that torch recorded for a node, or nothing."""
    trace = node.meta.get("stack_trace")
    found = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', trace) if isinstance(trace, str) else []
    if not found:
        return ""
    file, line, code = found[-1]
    return f" ({file}, line {line}: {code.strip()})"

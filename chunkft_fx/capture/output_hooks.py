"""Installs transformers' hooks for hidden states, attentions and router logits before a call that needs them.

transformers installs them behind a lock when such outputs are first asked for, and Dynamo enters no lock. Once they are
there, they are traced like any hook. They cannot be pickled, so a model that never asks for such outputs gets none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn


def install_output_hooks(model: nn.Module) -> bool:
    """Install the hooks that the first call of the plain model would install; returns False if they were there."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    install = getattr(capturing, "maybe_install_capturing_hooks", None)
    if install is None:
        return False
    done = False
    # outermost first, as calls come: a model installs for the models within it
    for module in model.modules():
        if _captures(module, capturing) and not getattr(module, "_output_capturing_hooks_installed", False):
            install(module)
            done = True
    return done


def _captures(module: nn.Module, capturing: Any) -> bool:
    """Whether transformers' decorator is around the module's forward."""
    return any(code.co_filename == capturing.__file__ for code in _layers(type(module).forward))


def _layers(function: Any) -> Iterator[Any]:
    """The code of a function and of what its decorators wrap."""
    while function is not None:
        if hasattr(function, "__code__"):
            yield function.__code__
        function = getattr(function, "__wrapped__", None)

"""Installs and replaces hooks of transformers that could not be traced, when a call did not get through.

Those for hidden states, attentions and router logits are installed behind a lock when such outputs are first asked for,
and Dynamo enters no lock. Once they are there, they are traced like any hook. They cannot be pickled, so a model that
never asks for such outputs gets none.

The one of activation checkpointing marks embeddings as wanting gradients, for checkpoints that look at their inputs
alone. A trace looks at weights, and Dynamo refuses the mark where embeddings have no gradient: frozen, or evaluated.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# The module and the name of the hook on embeddings.
_MARKS = ("transformers.modeling_utils", "make_inputs_require_grads")


def make_hooks_traceable(model: nn.Module) -> bool:
    """Install the hooks that calls would install, and have none mark embeddings; False if all of it was done before."""
    done = False
    # outermost first, as calls come: a model installs for the models within it
    for module in model.modules():
        done |= _install_output_hooks(module)
        for key, hook in module._forward_hooks.items():
            if (getattr(hook, "__module__", None), getattr(hook, "__name__", None)) == _MARKS:
                module._forward_hooks[key] = _mark  # under the same key, by which transformers removes it
                done = True
    return done


def _mark(module: nn.Module, inputs: Any, output: Tensor) -> None:
    """transformers' hook, for the plain model alone."""
    if not torch.compiler.is_compiling():
        output.requires_grad_(True)


def _install_output_hooks(module: nn.Module) -> bool:
    """Install the hooks that the first call of the plain model would install, if any, and if they are not there."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    install = getattr(capturing, "maybe_install_capturing_hooks", None)
    is_there = getattr(module, "_output_capturing_hooks_installed", False)
    if install is None or is_there or not _captures(module, capturing):
        return False
    install(module)
    return True


def _captures(module: nn.Module, capturing: Any) -> bool:
    """Whether transformers' decorator is around the module's forward."""
    return any(code.co_filename == capturing.__file__ for code in _layers(type(module).forward))


def _layers(function: Any) -> Iterator[Any]:
    """The code of a function and of what its decorators wrap."""
    while function is not None:
        if hasattr(function, "__code__"):
            yield function.__code__
        function = getattr(function, "__wrapped__", None)

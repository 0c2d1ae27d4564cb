"""Rewrites the fused head that TRL gives a model, so that it is traced with the model and runs as one of this library.

TRL's trainers replace the forward of their model by one that runs the backbone and then a function of its own on the
hidden states and ``lm_head.weight``: a loop over tiles, in Triton on a GPU, over a number of tokens that depends on the
labels. That is not traced as one graph. Here the same forward has `head.log_probs` in the place of that function, over
all tokens. What it does beside (scaling, capping, masks, auxiliary losses, its outputs) stays TRL's code.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chunkft_fx.head import log_probs

# Names that TRL's forward looks up: its autograd function, and whether tokens without a label are left out.
_FUNCTION, _COMPACT = "_ChunkedLogProbFunction", "_use_triton"
# The outputs of that function beside the log-probabilities, in order.
_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@contextlib.contextmanager
def traceable_head(model: nn.Module) -> Iterator[None]:
    """Give the model a forward that can be traced, if it has TRL's; TRL's again if what is done inside fails."""
    fused: Any = model.__dict__.get("forward")
    if not has_fused_head(model):
        yield
        return
    model.forward = types.MethodType(_traceable(fused.__func__), model)
    try:
        yield
    except BaseException:
        model.forward = fused
        raise


def has_fused_head(model: nn.Module) -> bool:
    """Whether the model's forward is TRL's, with its fused head."""
    function = getattr(model.__dict__.get("forward"), "__func__", None)
    code = getattr(function, "__code__", None)
    return code is not None and {_FUNCTION, _COMPACT} <= set(code.co_names)


def _traceable(forward: types.FunctionType) -> types.FunctionType:
    """The same function with our operator in the place of TRL's."""
    own = forward.__globals__ | {_FUNCTION: _TokenLogProbs, _COMPACT: _never}
    del own["__name__"]  # by which Dynamo would look names up in TRL's own module
    made = types.FunctionType(forward.__code__, own, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    made.__dict__.update(forward.__dict__)  # __wrapped__, by which its signature is the model's
    return made


def _never(device: torch.device) -> bool:
    return False


class _TokenLogProbs:
    """Has the place, the arguments and the results of TRL's autograd function."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = _OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        wanted = [name in outputs for name in _OUTPUTS]
        # the temperature divides the capped scores: as the cap does, so it comes out of the hyperbolic tangent
        softcap = None if final_logit_softcapping is None else final_logit_softcapping / temperature
        found = log_probs.forward(
            hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), targets,
            logit_scale / temperature, softcap, wanted,
        )  # fmt: skip
        return found[0], *(x if is_wanted else None for x, is_wanted in zip(found[1:], wanted, strict=True))

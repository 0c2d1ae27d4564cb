"""One transformers family held to the plain model: gradients of every chunk, another batch shape, evaluation, dropout.

Outcomes: ``right``; ``refused by both`` (a `ChunkFTError`, and ``torch.compile(fullgraph=True, backend="aot_eager")``
fails too); ``refused, see limits.md`` (it trains there, and the docs say why not here); and the faults ``refused by
us`` (it trains there), ``wrong`` and ``other exception``; ``not built`` when the tiny model or its batch did not come
about, which says nothing of this library.
"""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.errors import ChunkFTError
from chunkft_fx.module.module import CompiledModule
from tests.coverage.family_batches import batch_for, loss_of, with_image_tokens
from tests.coverage.family_configs import has_dropout, tiny_config, without_dropout
from tests.support.equivalence import relative_error

RIGHT, REFUSED, NOT_BUILT = "right", "refused by both", "not built"
LIMIT = "refused, see limits.md"
AS_TORCH = "as torch.compile, not as the plain model"
DOCUMENTED = ("forward writes the weight",)  # refusals of what torch trains that docs/limits.md gives the reason of
FAULTS = ("refused by us", "wrong", "other exception")
TOLERANCE = 1e-4  # relative to each parameter's gradient, float32
LARGEST = 30_000_000  # parameters of a model that still counts as tiny
PARTS = ("first batch", "evaluation", "second batch", "dropout")


@dataclass
class Result:
    """What became of one family in one task; ``where`` is the part of the check that failed."""

    task: str
    family: str
    model: str
    outcome: str
    where: str = ""
    detail: str = ""
    aot_eager: str = ""
    parameters: int = 0
    largest_error: float = 0.0
    dropout: bool = False
    seconds: float = 0.0
    parts: tuple[str, ...] = ()


class Wrong(Exception):
    """A number that differs from the plain model's."""


def check(task: str, family: str, model_class: Any, parts: tuple[str, ...] = PARTS) -> Result:
    """Hold one family to its plain model, in these parts of the check; `seconds` are of processor time."""
    began = time.process_time()
    result = Result(task, family, model_class.__name__, NOT_BUILT, parts=parts)
    try:
        model, batch = built(result, model_class, keep_dropout=False)
        plain_gradients(model, batch)
    except Exception as error:
        result.detail = told(error)
    else:
        _compare(result, model, batch, model_class)
    result.seconds = round(time.process_time() - began, 1)
    return result


def built(result: Result, model_class: Any, keep_dropout: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model of a class, in float32, and a batch for it; raises `ValueError` if it is not tiny."""
    config = tiny_config(model_class.config_class)
    result.dropout = has_dropout(config)
    if not keep_dropout:
        without_dropout(config)
    torch.manual_seed(0)
    model: nn.Module = model_class(config).float().train()
    result.parameters = sum(p.numel() for p in model.parameters())
    if result.parameters > LARGEST:
        raise ValueError(f"{result.parameters} parameters are not tiny")
    return model, with_image_tokens(model, batch_for(model, result.task))


def _compare(result: Result, model: nn.Module, batch: dict[str, Any], model_class: Any) -> None:
    where = "first batch"
    trial = model, batch
    try:
        compiled = chunkft_fx.compile(copy.deepcopy(model), "4GB", chunks=3, interval=1, backend="eager")
        if where in result.parts:
            result.largest_error = compare_gradients(compiled, *trial)
        where = "evaluation"
        if where in result.parts:
            compare_evaluation(compiled, batch)
        where = "second batch"
        other = with_image_tokens(model, batch_for(model, result.task, size=3, tokens=24))
        if where in result.parts and sized(other) != sized(batch) and trains(model, other):
            trial = model, other
            compare_gradients(compiled, *trial)
        where = "dropout"
        if where in result.parts and result.dropout:
            trial = built(result, model_class, keep_dropout=True)
            compare_gradients(
                chunkft_fx.compile(copy.deepcopy(trial[0]), "4GB", chunks=3, interval=1, backend="eager"), *trial
            )
    except Wrong as error:
        result.outcome, result.where, result.detail = "wrong", where, str(error)
    except ChunkFTError as error:
        result.where, result.detail = where, told(error)
        result.aot_eager = aot_eager(*trial)
        ours = LIMIT if any(reason in result.detail for reason in DOCUMENTED) else "refused by us"
        result.outcome = ours if result.aot_eager == "trains" else REFUSED
    except Exception as error:
        result.outcome, result.where, result.detail = "other exception", where, told(error) + raised_at(error)
        result.aot_eager = aot_eager(*trial)
    else:
        result.outcome = RIGHT
    if result.outcome == "wrong":
        result.aot_eager = aot_eager(*trial)
        if result.aot_eager.startswith("wrong") and _equals_aot_eager(*trial):
            result.outcome = AS_TORCH


def sized(batch: dict[str, Any]) -> dict[str, Any]:
    """The shapes in a batch."""
    return {n: tuple(v.shape) if isinstance(v, Tensor) else v for n, v in batch.items()}


def trains(model: nn.Module, batch: dict[str, Any]) -> bool:
    """Whether the plain model takes a batch."""
    try:
        plain_gradients(model, batch)
    except Exception:
        return False
    return True


def plain_gradients(model: nn.Module, batch: dict[str, Any], call: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a copy of the plain model, or of what ``call`` makes of the copy."""
    plain = copy.deepcopy(model)
    function = plain if call is None else call(plain)
    torch.manual_seed(5)
    loss = loss_of(function(**copied(batch)))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}


def copied(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of its own: some models write into theirs."""
    return {n: v.clone() if isinstance(v, Tensor) else v for n, v in batch.items()}


def compare_gradients(
    compiled: CompiledModule, model: nn.Module, batch: dict[str, Any], call: Callable[[nn.Module], Any] | None = None
) -> float:
    """The largest relative error of a chunk's gradients against the plain model's; `Wrong` above the tolerance.

    With ``call``, against what that makes of the plain model.
    """
    loss, dense = plain_gradients(model, batch, call)
    norms = [float(g.norm()) for g in dense.values()]
    # below this a gradient is the rounding of sums that cancel, such as that of a bias before a normalisation
    scale = 1e-3 * max(norms)
    if not torch.isfinite(loss) or not scale < float("inf"):
        raise Wrong("the plain model's loss or gradient is not finite: the check says nothing")
    largest = 0.0
    state = {n: v.clone() for n, v in compiled.state_dict().items()}
    for k in range(3):
        compiled.activate(k)
        compiled.zero_grad()
        compiled.load_state_dict(state)  # running statistics
        torch.manual_seed(5)
        ours = loss_of(compiled(**copied(batch)))
        ours.backward()
        if abs(float(ours) - float(loss)) > TOLERANCE * max(abs(float(loss)), 1e-3):
            raise Wrong(f"loss {float(ours)} of chunk {k} where the plain model has {float(loss)}")
        chosen = compiled.active_slices()
        if all(s.grad is None for s in chosen) and any(s.name in dense for s in chosen):
            raise Wrong(f"chunk {k} got no gradient at all")
        for s in chosen:
            largest = max(largest, _error(s, dense.get(s.name), scale, k))
    return largest


def _error(part: Any, dense: Tensor | None, scale: float, chunk: int) -> float:
    """The relative error of one active slice."""
    if dense is None:
        if part.grad is not None and float(part.grad.norm()) > 0:
            raise Wrong(f"{part.name} of chunk {chunk} has a gradient that it has not in the plain model")
        return 0.0
    expected = dense if part.slice.is_whole else dense.narrow(part.dim, part.start, part.length)
    actual = torch.zeros_like(expected) if part.grad is None else part.grad
    error = relative_error(actual, expected, scale)
    if not error <= TOLERANCE:
        raise Wrong(f"gradient of {part.name} in chunk {chunk}: relative error {error:.1e}")
    return error


def compare_evaluation(compiled: CompiledModule, batch: dict[str, Any]) -> None:
    """Outputs in evaluation under ``no_grad`` against those of the plain model."""
    plain = copy.deepcopy(compiled._model).eval()
    compiled.eval()
    with torch.no_grad():
        torch.manual_seed(5)
        expected = plain(**copied(batch))
        torch.manual_seed(5)
        actual = compiled(**copied(batch))
    compiled.train()
    if set(expected) != set(actual):
        raise Wrong(f"evaluation returns {sorted(actual)} where the plain model returns {sorted(expected)}")
    for name in expected:
        if isinstance(expected[name], Tensor) and expected[name].is_floating_point():
            error = relative_error(actual[name], expected[name], 1e-6)
            if not error <= TOLERANCE and bool(expected[name].isfinite().all()):
                raise Wrong(f"output {name} in evaluation: relative error {error:.1e}")


def aot_eager(model: nn.Module, batch: dict[str, Any]) -> str:
    """``trains`` if plain ``torch.compile(fullgraph=True)`` gives the plain model's gradients, else why not."""
    torch._dynamo.reset()
    _, dense = plain_gradients(model, batch)
    try:
        _, theirs = plain_gradients(model, batch, lambda m: torch.compile(m, backend="aot_eager", fullgraph=True))
    except Exception as error:
        return told(error)
    scale = 1e-3 * max(float(g.norm()) for g in dense.values())
    wrong = [n for n, g in dense.items() if n not in theirs or not relative_error(theirs[n], g, scale) <= TOLERANCE]
    return f"wrong gradients: {', '.join(wrong[:3])}" if wrong else "trains"


def _equals_aot_eager(model: nn.Module, batch: dict[str, Any]) -> bool:
    """Whether ours are the loss and gradients that torch.compile gives, where those are not the plain model's.

    Some models draw their random numbers in another order when they are traced.
    """
    torch._dynamo.reset()
    compiled = chunkft_fx.compile(copy.deepcopy(model), "4GB", chunks=3, interval=1, backend="eager")
    try:
        compare_gradients(compiled, model, batch, lambda m: torch.compile(m, backend="aot_eager", fullgraph=True))
    except Wrong:
        return False
    return True


def told(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def raised_at(error: BaseException) -> str:
    """The last place of this library that an error went through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/chunkft_fx/" in f.filename]
    return f" (at {frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""


def as_record(result: Result) -> dict[str, Any]:
    """A result as plain data."""
    return asdict(result)

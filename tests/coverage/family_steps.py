"""Full coverage of one transformers family in float64: ten steps held to torch's AdamW on the plain model.

Both ways of updating (at the step, in the backward) get a loop of their own, drawn by the family's name alone:
accumulation, clipping, a group without decay, a frozen parameter, weights in host memory. `Outcomes` are those of
`tests.coverage.family_check`; ``as torch.compile, not as the plain model`` where ours are the weights that
``torch.compile(fullgraph=True, backend="aot_eager")`` trains; and `ROUNDING` where the plain model, its weights moved
by 1e-13, gets as far from itself: it computes in float32 within, and a gradient that is zero but for rounding decides.
"""

from __future__ import annotations

import copy
import random
import time
from typing import Any

import torch
from torch import Tensor, nn

from chunkft_fx.errors import ChunkFTError
from tests.coverage.family_batches import ORDINARY, loss_of
from tests.coverage.family_check import (
    AS_TORCH,
    DOCUMENTED,
    LIMIT,
    NOT_BUILT,
    REFUSED,
    RIGHT,
    Result,
    aot_eager,
    built,
    raised_at,
    told,
)
from tests.support.full_coverage import UPDATES, Batches, Loop, difference, of_the_plain_model, with_full_coverage

TOLERANCE = 1e-9  # of each element of parameters and buffers after ten steps, absolute below 1 and relative above
ROUNDED = 1e-13
ROUNDING = "differs, as the plain model from itself by 1e-13"
TEXT = ("input_ids", "decoder_input_ids", "labels")


def check(task: str, family: str, model_class: Any) -> Result:
    """Hold one family to its plain model; `seconds` are of processor time."""
    began = time.process_time()
    result = Result(task, family, model_class.__name__, NOT_BUILT, parts=UPDATES)
    try:
        model, batch = built(result, model_class, keep_dropout=False)
        model, batch = _double(model, batch)
        loops = [_drawn(update, model, random.Random(f"{task}/{family}/{update}")) for update in UPDATES]
        trained = [_plain(model, batch, loop) for loop in loops]
    except Exception as error:
        result.detail = told(error)
    else:
        for loop, expected in zip(loops, trained, strict=True):
            _compare(result, model, batch, loop, expected)
            if result.outcome != RIGHT:
                break
    result.seconds = round(time.process_time() - began, 1)
    return result


def _plain(model: nn.Module, batch: dict[str, Any], loop: Loop) -> dict[str, Tensor]:
    expected = of_the_plain_model(model, loop, _batches(batch), loss_of)
    if not all(bool(v.isfinite().all()) for v in expected.values()):
        raise ValueError("the plain model's weights are not finite numbers: the check says nothing")
    return expected


def _compare(result: Result, model: nn.Module, batch: dict[str, Any], loop: Loop, expected: dict[str, Tensor]) -> None:
    result.where = str(loop)
    try:
        ours = with_full_coverage(model, loop, _batches(batch), loss_of)
    except ChunkFTError as error:
        result.detail, result.aot_eager = told(error), aot_eager(model, batch)
        refused = LIMIT if any(reason in result.detail for reason in DOCUMENTED) else "refused by us"
        result.outcome = refused if result.aot_eager == "trains" else REFUSED
        return
    except Exception as error:
        result.outcome, result.detail = "other exception", told(error) + raised_at(error)
        return
    most, name = difference(ours, expected)
    result.largest_error = max(result.largest_error, most)
    if most <= TOLERANCE:
        result.outcome, result.where = RIGHT, ""
        return
    result.detail = f"{name} differs by {most:.1e} after {loop.steps} steps"
    if _is_as_compiled(model, batch, loop, ours):
        result.outcome = AS_TORCH
    else:
        result.outcome = ROUNDING if _amplified(model, batch, loop, expected) >= most else "wrong"


def _amplified(model: nn.Module, batch: dict[str, Any], loop: Loop, expected: dict[str, Tensor]) -> float:
    """How far the plain model gets from itself where all its weights are moved by what float64 rounds away."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(ROUNDED)
    return difference(of_the_plain_model(moved, loop, _batches(batch), loss_of), expected)[0]


def _is_as_compiled(model: nn.Module, batch: dict[str, Any], loop: Loop, ours: dict[str, Tensor]) -> bool:
    torch._dynamo.reset()

    def call(m: nn.Module) -> Any:
        return torch.compile(m, backend="aot_eager", fullgraph=True)

    try:
        theirs = of_the_plain_model(model, loop, _batches(batch), loss_of, call)
    except Exception:
        return False
    return difference(ours, theirs)[0] <= TOLERANCE


def _drawn(update: str, model: nn.Module, draw: random.Random) -> Loop:
    """A loop in which at least one parameter is trained."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    frozen = names.pop(draw.randrange(len(names))) if len(names) > 1 and draw.random() < 0.5 else ""
    return Loop(
        update,
        micro=draw.randint(1, 2),
        clip=0.05 if update == "step" and draw.random() < 0.5 else None,
        no_decay=tuple(draw.sample(names, draw.choice((0, (len(names) + 1) // 2)))),
        frozen=(frozen,) if frozen else (),
        streamed=draw.choice(("", "all", "mixed")),
    )


def _double(model: nn.Module, batch: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Model and batch in float64, for which torch has no product of grouped matrices, of which experts are made."""
    choose = getattr(model, "set_experts_implementation", None)
    if choose is not None:
        choose("batched_mm")
    floating = {n: v.double() for n, v in batch.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return model.double(), batch | floating


def _batches(batch: dict[str, Any]) -> Batches:
    """A batch with other words and other values for every backward pass, in the same shapes."""
    least, most = ORDINARY

    def at(step: int, micro: int) -> dict[str, Any]:
        moved = dict(batch)
        for name, value in batch.items():
            if isinstance(value, Tensor):
                moved[name] = value * (1 + 0.1 * step + 0.01 * micro) if value.is_floating_point() else value.clone()
            if name in TEXT:
                ordinary = (value >= least) & (value < most)
                shifted = (value - least + 7 * step + 3 * micro) % (most - least) + least
                moved[name] = torch.where(ordinary, shifted, value)
        return moved

    return at

"""Runs ``compile``, the public entry point: checks what the user asked, and makes the module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from chunkft_fx.bytes import parse_bytes
from chunkft_fx.copies.residency import compute_device
from chunkft_fx.errors import AlreadyCompiled, OptionError
from chunkft_fx.graph.region import Pass, ProgramPass
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.plan.schedule import ChunkSchedule, check_interval
from chunkft_fx.planning.coverage.asked import check_coverage
from chunkft_fx.planning.example_batch import arguments_of
from chunkft_fx.planning.planner import BACKENDS, Options, first_plan
from chunkft_fx.torch_internals import is_torch_compiled


def compile(
    model: nn.Module,
    budget: str | int,
    *,
    coverage: str = "auto",
    chunks: int | str = "auto",
    order: str = "ascending",
    interval: int | str = "auto",
    backend: str = "inductor",
    seed: int = 0,
    return_logits: bool = False,
    device: torch.device | str | None = None,
    batch: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    region_passes: Sequence[Pass] = (),
    program_passes: Sequence[ProgramPass] = (),
) -> CompiledModule:
    """Compile a model for full-parameter training within a byte budget.

    ``budget`` is the device memory to stay within (``"24GB"``, ``"24GiB"`` or bytes). ``coverage`` is what a
    step trains: ``"one"`` chunk of the parameters, or ``"all"`` of them; optimizer states then pass through the device
    in pieces. ``"auto"`` chooses for the first training batch, before there is any state: all parameters, unless that
    does not fit the budget or host memory, or is predicted to take longer than a sweep over all chunks, which is taken
    to teach as much; the plan says which, and why. Who gives ``chunks``, ``order`` or ``interval`` gets a chunk a step.
    ``chunks`` is a number or ``"auto"``: on a GPU as many as make the predicted sweep short, on the CPU the fewest that
    fit the budget. ``order`` is how a sweep visits them (``"ascending"``, ``"descending"``,
    ``"random"`` with ``seed``), ``interval`` the optimizer steps spent on each at a turn: with ``"auto"`` as many as
    give a sweep 40 steps, and 1 from 40 chunks on, because few chunks in turns of one step diverge at rates at which
    training all parameters at once does not. With "auto" chunks also warm up: turns of the first sweep have one step,
    and a rate above 2% of the weights' root mean square rises to its value over each chunk's first 40 updates
    (`optimizer.last_rates` has what was used). ``backend="eager"`` runs the rewritten FX graphs as they are,
    ``"inductor"`` compiles them. ``device`` is where the model runs, by default where its first parameter is; its
    weights can be anywhere: those that the budget cannot hold stay in host memory and are fetched for each use.
    ``batch`` is an example of the largest training batch, as the arguments of one call (a dict of keyword arguments, or
    a tuple): the plan is made for it at the first training call, whatever that call brings. Only shapes and dtypes
    count, so tensors on the device ``"meta"`` will do. A batch that is larger in any size than those planned for is
    planned for before it runs, with or without ``batch``; once a sweep has begun chunks and streamed weights stay.
    ``region_passes`` and ``program_passes`` are passes of your own (`chunkft_fx.graph.region` says what one is): they
    run behind the library's, over the joint graph of each region and over the program of each chunk. The model is
    traced at its first call; it must trace with ``torch.compile(fullgraph=True)``. In training, logits that only feed a
    cross-entropy are never held whole: the model returns `MissingLogits` in their place, which raises `LogitsNotKept`
    when it is read, unless ``return_logits``. In evaluation and under ``no_grad`` it returns them.

    Raises `BudgetParseError`, `ChunkCountError`, `OptionError`, `NoTrainableParameters`, `AlreadyCompiled`;
    a call with a new kind of batch can raise `UnsupportedGraph` or `BudgetInfeasible`, and then changed nothing.
    """
    if isinstance(model, CompiledModule):
        raise AlreadyCompiled("this model was already compiled by chunkft_fx; call compile once, on the plain model")
    if is_torch_compiled(model):
        raise AlreadyCompiled("this model was already compiled by torch.compile; pass the plain model instead")
    if not isinstance(model, nn.Module):
        raise OptionError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if backend not in BACKENDS:
        raise OptionError(f"backend={backend!r} is not known; choose one of {', '.join(BACKENDS)}")
    if chunks != "auto" and (isinstance(chunks, bool) or not isinstance(chunks, int)):
        raise OptionError(f'chunks={chunks!r} is not known; give a number or "auto"')
    check_coverage(coverage, chunks)
    ChunkSchedule(1, order, seed=seed)
    check_interval(interval)
    if batch is not None:
        arguments_of(batch)
    own, outer = _passes("region_passes", region_passes), _passes("program_passes", program_passes)
    options = Options(parse_bytes(budget), chunks, order, interval, seed, return_logits, coverage, batch, own, outer)
    target = compute_device(model, device)
    return CompiledModule(model, options, backend, first_plan(model, options), target)


def _passes(option: str, given: Sequence[Any]) -> tuple[Any, ...]:
    """The passes of an option; `OptionError` for what is none."""
    for step in given:
        if not callable(step) or not isinstance(getattr(step, "name", None), str):
            raise OptionError(f"{option} has {step!r}, which is no pass: a pass has a name and is called with a graph")
    return tuple(given)

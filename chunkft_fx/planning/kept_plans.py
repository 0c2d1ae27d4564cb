"""Decides whether a plan that an earlier process made is taken again: plans are kept in the cache folder ``plans``.

A plan is found by a digest of all that the planner reads, so that another process with the same question gets the same
plan without a search. What the digest cannot tell is planned anew and not kept: passes of the user's own, and kernels
that are measured while graphs are made. A kept plan is held to the memory model once more before it is taken.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

import chunkft_fx
from chunkft_fx.capture.outline import value_text
from chunkft_fx.errors import ChunkFTError
from chunkft_fx.machine.cache import CacheFolder, device_key
from chunkft_fx.plan.chunk import Chunk
from chunkft_fx.plan.plan import Plan
from chunkft_fx.plan.policy import Policy
from chunkft_fx.plan.state_spec import StateSpec
from chunkft_fx.planning.planner import Options, needed_nbytes, parameter_specs, plan_for_batch
from chunkft_fx.predict.predictor import Predictor
from chunkft_fx.program.programs import Programs
from chunkft_fx.program.run_passes import is_verifying
from chunkft_fx.torch_internals import settings_text

log = logging.getLogger("chunkft_fx.planning.kept_plans")

# A plan of a 7B model takes 0.1 MB, with a few hundred chunks or pieces up to 1 MB.
FOLDER = CacheFolder("plans", 32 * 2**20)


def known_or_made(
    model: nn.Module,
    options: Options,
    known: Plan | None,
    predictor: Predictor,
    batch: str,
    spec: StateSpec,
    micro_batches: int = 1,
) -> Plan:
    """`planner.plan_for_batch`, or what it once returned for the same question.

    With ``CHUNKFT_VERIFY=1`` in the environment every plan is made anew.
    """
    programs = predictor.programs
    own = programs.specializer.is_asked or options.passes or options.program_passes
    if own or is_verifying():
        return plan_for_batch(model, options, known, predictor, batch, spec, micro_batches)
    key = digest(model, options, known, predictor, spec)
    plan = _kept(key, known)
    if plan is not None and _is_right(plan, model, options, predictor, spec, key):
        return plan
    made = plan_for_batch(model, options, known, predictor, batch, spec, micro_batches)
    text = _without_repetition(made).to_json()
    FOLDER.store(key, f"{_checksum(text)}\n{text}")
    return made


def digest(model: nn.Module, options: Options, known: Plan | None, predictor: Predictor, spec: StateSpec) -> str:
    """What a plan depends on as a name for a file; equal questions have equal ones, in all processes."""
    found = hashlib.sha256()
    for part in _parts(model, options, known, predictor, spec):
        found.update(f"{part!r}\n".encode())
    return found.hexdigest()


def _parts(
    model: nn.Module, options: Options, known: Plan | None, predictor: Predictor, spec: StateSpec
) -> Iterator[Any]:
    """All that the planner reads, as values whose text says all of them."""
    programs = predictor.programs
    yield _library(), _versions(), settings_text(), device_key(programs.device)
    yield [(f.name, getattr(options, f.name)) for f in fields(options) if f.compare]
    yield None if known is None else known.chunks
    yield spec, predictor.asked, parameter_specs(model, spec)
    for tensors in (model.named_parameters(), model.named_buffers()):
        yield [(name, value_text(t), t.requires_grad) for name, t in tensors]
    yield from _of_programs(programs)


def _of_programs(programs: Programs) -> Iterator[Any]:
    """The graphs that programs are made of, by the structure of each region and the names that connect them."""
    capture = programs.capture
    yield programs.backend, programs.inputs, [(n, value_text(p)) for n, p in programs.parameters.items()]
    for f in fields(capture):
        if f.name not in ("graph", "fake_mode", "constants", "path"):
            yield f.name, getattr(capture, f.name)
    yield [(name, value_text(value)) for name, value in capture.constants.items()]
    yield [(n.name, value_text(n.meta["val"])) for n in capture.graph.find_nodes(op="placeholder")]
    for region in programs.outline.regions:
        yield [region.template.key if f.name == "template" else getattr(region, f.name) for f in fields(region)]


@functools.cache
def _library() -> str:
    """A digest of this library's source files, so that no other version of it takes its plans."""
    found = hashlib.sha256()
    root = Path(chunkft_fx.__file__).parent
    for folder, _, names in sorted(os.walk(root, followlinks=True)):  # passes and tools can be links
        for path in (Path(folder, name) for name in sorted(names) if name.endswith(".py")):
            found.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return found.hexdigest()


@functools.cache
def _versions() -> tuple[str, ...]:
    found = [torch.__version__, str(torch.version.git_version)]
    for name in ("triton", "networkx", "numpy"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return tuple(found)


def _kept(key: str, known: Plan | None) -> Plan | None:
    """The plan that was kept for a question, with the very chunks that are given; None if there is none to be read."""
    stored = FOLDER.load(key)
    if stored is None:
        return None
    checksum, _, text = stored.partition("\n")
    if checksum != _checksum(text):
        log.warning("%s is damaged; its plan is made anew", FOLDER.path(key))
        return None
    try:
        plan = _with_repetition(Plan.from_json(text))
    except (ValueError, ChunkFTError) as error:
        log.warning("%s is not used; its plan is made anew: %s", FOLDER.path(key), error)
        return None
    if known is None:
        return plan
    return replace(plan, chunks=known.chunks) if plan.chunks == known.chunks else None


def _is_right(plan: Plan, model: nn.Module, options: Options, predictor: Predictor, spec: StateSpec, key: str) -> bool:
    """Whether the first chunk's step needs no more than a kept plan says, and that fits the budget."""
    said = plan.predicted_peak_bytes or 0
    needed = needed_nbytes(model, plan, predictor, spec)
    if needed <= said <= options.budget_bytes:
        log.debug("the plan in %s is taken", FOLDER.path(key))
        return True
    log.warning(
        "%s is not used; its plan is made anew: it says %d bytes of a budget of %d, and its first step needs %d",
        FOLDER.path(key), said, options.budget_bytes, needed,
    )  # fmt: skip
    return False


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _without_repetition(plan: Plan) -> Plan:
    """A plan whose choices that were not taken leave out the pieces, which are those of its own policy."""
    return _considering_pieces(plan, ())


def _with_repetition(plan: Plan) -> Plan:
    return _considering_pieces(plan, plan.policy.pieces.chunks)


def _considering_pieces(plan: Plan, chunks: tuple[Chunk, ...]) -> Plan:
    def with_pieces(policy: Policy) -> Policy:
        return replace(policy, pieces=replace(policy.pieces, chunks=chunks))

    return replace(plan, considered=tuple(replace(c, policy=with_pieces(c.policy)) for c in plan.considered))

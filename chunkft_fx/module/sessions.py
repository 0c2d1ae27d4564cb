"""Writes a session for each graph that Dynamo traces of a model: captured, cut into regions, ready to run.

A part of a batch that is split is captured first, and its session made when it is known what the part is told of the
whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from chunkft_fx.capture.aliases import separate_outputs
from chunkft_fx.capture.blocks import block_paths, warn_if_unseen
from chunkft_fx.capture.capture import Capture
from chunkft_fx.capture.outline import outline
from chunkft_fx.capture.repeats import captured
from chunkft_fx.head.rewrite import chunk_head
from chunkft_fx.machine.kernel_choice import chooser
from chunkft_fx.program.programs import Programs
from chunkft_fx.runtime.session import Owner, Session


class SessionOwner(Owner, Protocol):
    """What a new session needs of a training: the backend that lowers its graphs, and the sessions there are."""

    @property
    def backend(self) -> str: ...

    @property
    def sessions(self) -> list[Session]: ...


@dataclass(frozen=True)
class Traced:
    """A captured graph; ``batch`` are the positions of its inputs that are neither weights nor buffers."""

    capture: Capture
    batch: tuple[int, ...]


def new_session(owner: SessionOwner, gm: fx.GraphModule, inputs: Sequence[Any], is_training: bool) -> Session:
    """The session of a graph that Dynamo traced; ``inputs`` are the tensors of that trace, weights too.

    Raises `UnsupportedGraph` for a graph that cannot be captured.
    """
    return session_of(owner, traced(owner, gm, inputs, is_training), is_training)


def traced(owner: SessionOwner, gm: fx.GraphModule, inputs: Sequence[Any], is_training: bool) -> Traced:
    """Dynamo's graph as it is captured; `UnsupportedGraph` if it cannot be."""
    model, residency = owner.plain, owner.residency
    if is_training and not owner.options.return_logits:
        chunk_head(gm)
    separate_outputs(gm)
    names = {id(p): name for name, p in residency.parameters.items()}
    joint = captured(gm, inputs, names, owner.backend, model)
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    batch = [i for i, t in enumerate(inputs) if isinstance(t, Tensor) and id(t) not in names and _is_apart(t, held)]
    return Traced(joint, tuple(batch))


def session_of(
    owner: SessionOwner, found: Traced, is_training: bool, joined: tuple[Tensor, ...] | None = None
) -> Session:
    """The session of a captured graph; ``joined`` are what `BatchPlans` asks of a part of a batch that is split."""
    model, residency, options, joint = owner.plain, owner.residency, owner.options, found.capture
    modules = list(model.named_modules())
    regions = outline(joint, block_paths(modules))
    if joint.tangents and not any(s.capture.tangents for s in owner.sessions):  # once a model
        warn_if_unseen(modules, joint.parameters.values(), [r.label for r in regions.regions])
    looks = {n: torch.empty_like(p, device="meta") for n, p in residency.parameters.items()}
    choose, own = chooser(residency.device), (options.passes, options.program_passes)
    programs = Programs(joint, regions, looks, owner.backend, residency.device, choose, *own)
    return Session(owner, programs, found.batch, is_training, joined)


def _is_apart(t: Tensor, held: set[int]) -> bool:
    """Whether a tensor has memory of its own, beside what a model holds."""
    return t.layout is not torch.strided or t.untyped_storage().data_ptr() not in held

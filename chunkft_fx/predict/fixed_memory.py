"""Predicts the bytes of a plan that need no batch: weights, the ring of streamed ones, gradients, staged states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from chunkft_fx.copies.weight_ring import ring_buffer_nbytes
from chunkft_fx.plan.chunk import ALL, Chunk, Share
from chunkft_fx.plan.pieces import piece_nbytes, waiting_nbytes, weights_nbytes
from chunkft_fx.plan.policy import DEPTH, Policy
from chunkft_fx.plan.state_spec import ASSUMED, StateSpec, stage_capacity_nbytes
from chunkft_fx.ranks.ranks import SPREAD_NBYTES

# The parts of a predicted peak by name, in bytes.
Terms = dict[str, int]
RING_OF_STATES = "ring of optimizer states"
RING_OF_GRADIENTS = "ring of gradients"
BETWEEN_RANKS = "gradients and weights between ranks"


def resident_nbytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def ring_nbytes(
    parameters: Mapping[str, Tensor], uses: Sequence[frozenset[str]], streamed: frozenset[str], depth: int = DEPTH
) -> int:
    """Bytes of the buffers that streamed weights pass through, each as large as the largest region's."""
    return depth * ring_buffer_nbytes([[parameters[n] for n in use & streamed] for use in uses])


def weight_terms(
    parameters: Mapping[str, Tensor],
    resident: int,
    uses: Sequence[frozenset[str]] = (),
    streamed: frozenset[str] = frozenset(),
    depth: int = DEPTH,
) -> Terms:
    """Weights and buffers on the device, of ``resident`` bytes in all (`resident_nbytes`).

    ``uses`` says which parameters each region reads, ``streamed`` which stay in host memory and pass through a ring.
    """
    away = sum(parameters[n].numel() * parameters[n].itemsize for n in streamed)
    ring = {"ring of streamed weights": ring_nbytes(parameters, uses, streamed, depth)} if streamed else {}
    return {"weights and buffers": resident - away, **ring}


def piece_terms(
    parameters: Mapping[str, Tensor],
    whole: Chunk,
    policy: Policy,
    spec: StateSpec = ASSUMED,
    streamed: frozenset[str] = frozenset(),
) -> Terms:
    """Gradients of all parameters, where they wait for the step, and the rings that pieces pass through.

    ``streamed`` are the weights that pass through the ring of states with their states. An update, or a sum that is to
    wait in host memory, holds the gradients of its piece in a wider dtype.
    """
    gradients = chunk_terms(parameters, [whole], spec)["gradients of the active chunk"]
    widest = max(piece.numel for piece in policy.pieces) * 4
    share = ALL if spec.is_whole else Share(0, policy.ranks)
    # among several ranks the update itself writes the weights that stay in host memory
    passing = streamed if share.is_all else frozenset()
    terms = {
        RING_OF_STATES: policy.pieces.depth * piece_nbytes(policy.pieces, parameters, spec, passing, share),
        "gradients": widest if policy.takes_gradients else gradients,
    }
    if policy.host_gradients:
        terms[RING_OF_GRADIENTS] = policy.pieces.depth * waiting_nbytes(policy.pieces, parameters)
    return terms


def rank_terms(parameters: Mapping[str, Tensor], chunks: Sequence[Chunk], policy: Policy) -> Terms:
    """What passes between ranks at once: gradients of a piece, where the program takes them, and new weights.

    Weights take a share's room more, for that of this rank.
    """
    if policy.ranks == 1:
        return {}
    parts = policy.pieces or chunks
    largest = max(weights_nbytes(part, parameters) for part in parts)
    slices = (parameters[s.name].nbytes // s.size * s.length for part in parts for s in part.slices)
    weights = max(min(largest, SPREAD_NBYTES), max(slices))
    gradients = largest if policy.takes_gradients else 0
    return {BETWEEN_RANKS: gradients + weights + -(-weights // policy.ranks)}


def host_terms(
    parameters: Mapping[str, Tensor], chunks: Sequence[Chunk], policy: Policy, spec: StateSpec = ASSUMED
) -> Terms:
    """Bytes of host memory beside a GPU that stay from step to step, by kind.

    Gradients wait in the dtype of their parameters; where several backward passes are added up, in the wide dtype.
    """
    states = sum(stage_capacity_nbytes(c, parameters, spec) for c in chunks) if spec.is_kept else 0
    terms = {
        "optimizer states": states if spec.is_whole else states // policy.ranks,
        "streamed weights": sum(parameters[name].nbytes for name in policy.streamed),
        "gradients": _gradients_nbytes(parameters, chunks) if policy.host_gradients else 0,
    }
    return {name: nbytes for name, nbytes in terms.items() if nbytes}


def _gradients_nbytes(parameters: Mapping[str, Tensor], chunks: Sequence[Chunk]) -> int:
    """Bytes of the gradients of all chunks, as the backward makes them."""
    return sum(parameters[s.name].nbytes // s.size * s.length for c in chunks for s in c.slices)


def chunk_terms(parameters: Mapping[str, Tensor], chunks: Sequence[Chunk], spec: StateSpec = ASSUMED) -> Terms:
    """Gradients and staged states of the largest chunk."""
    widths = {name: torch.promote_types(p.dtype, torch.float32).itemsize for name, p in parameters.items()}
    sizes = {name: p.numel() for name, p in parameters.items()}
    return {
        "optimizer state of the active chunk": max(stage_capacity_nbytes(c, parameters, spec) for c in chunks),
        "gradients of the active chunk": max(
            sum(sizes[s.name] * s.length // s.size * widths[s.name] for s in c.slices) for c in chunks
        ),
    }

"""What a rank trains in tests: its rows of batches that the reference trains on whole, in the same number of steps."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import chunkft_fx
from tests.support.forced_streaming import streaming
from tests.support.waiting import waiting_in_host

ROWS, VOCABULARY, WIDTH = 6, 12, 8


class Net(nn.Module):
    """Two blocks over tied embeddings, of float64, with a scalar and a matrix that only batches of the ``odd`` use."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2))
        self.extra = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor, odd: bool = False) -> Tensor:
        x: Tensor = self.embed(ids) * self.scale
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        if odd:
            x = x + self.extra(x)
        return cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@dataclass(frozen=True)
class Case:
    """How a model is trained; ``uses``: whose batches use the odd matrix, ``rows``: of each rank."""

    options: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    kind: str = "AdamW"
    micro_batches: int = 1
    is_streamed: bool = False
    waits: bool = False
    is_copied: bool = False
    uses: tuple[bool, ...] = ()
    rows: tuple[int, ...] = ()
    steps: int = 10


def batch(step: int, micro: int) -> dict[str, Tensor]:
    """``ids`` and ``labels``, both ``i64[ROWS, 5]``: those of all ranks."""
    generator = torch.Generator("cpu").manual_seed(100 * step + micro)
    draw = [torch.randint(0, VOCABULARY, (ROWS, 5), generator=generator, device="cpu") for _ in range(2)]
    return {"ids": draw[0], "labels": draw[1]}


def model_of(seed: int) -> Net:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    return Net().double()


def made(case: Case, seed: int = 0) -> tuple[Any, Any]:
    """A compiled model and its optimizer."""
    options: dict[str, Any] = {"interval": 1, "backend": "eager"} | case.options
    if options.get("coverage") == "all":
        del options["interval"]
    compiled = chunkft_fx.compile(model_of(seed), "1GB", **options)
    kinds = {"AdamW": chunkft_fx.AdamW, "SGD": chunkft_fx.SGD, "Adafactor": chunkft_fx.Adafactor}
    return compiled, kinds[case.kind](compiled, lr=1e-2, **case.optimizer)


def losses_of(case: Case, compiled: Any, optimizer: Any, steps: range, rank: int = 0, size: int = 1) -> list[float]:
    """Train on this rank's rows; the loss of each step on all of them, and so the same on every rank."""
    rows = case.rows if size > 1 and case.rows else (ROWS // size,) * size
    first = sum(rows[:rank])
    losses = []
    for step in steps:
        total = 0.0
        for micro in range(case.micro_batches):
            device = next(compiled.parameters()).device
            own = {key: value[first : first + rows[rank]].to(device) for key, value in batch(step, micro).items()}
            is_last = micro == case.micro_batches - 1
            with nullcontext() if is_last else compiled.no_sync():
                loss = compiled(**own, odd=bool(case.uses) and case.uses[rank]) / case.micro_batches
                loss = chunkft_fx.mean_over_ranks(loss, own["ids"].numel())
                loss.backward()
            mean = loss.detach().clone()
            if size > 1:
                dist.all_reduce(mean)
            total += mean.item() / size
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def in_turn(case: Case, size: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of one process that runs the batches of ``size`` ranks one after the other in a step."""
    compiled, optimizer = made(case)
    losses, rows = [], ROWS // size
    for step in range(case.steps):
        total = 0.0
        for rank in range(size):
            own = {key: value[rank * rows : (rank + 1) * rows] for key, value in batch(step, 0).items()}
            with nullcontext() if rank == size - 1 else compiled.no_sync():
                loss = compiled(**own, odd=case.uses[rank]) / size
                loss.backward()
            total += loss.item()
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: p.detach().clone() for name, p in compiled.named_parameters()}


def trained(case: Case, rank: int = 0, size: int = 1) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights after training; every rank begins with other weights, and goes on from those of rank 0."""
    with ExitStack() as stack:
        if case.is_streamed:
            stack.enter_context(streaming("all"))
        if case.waits:
            stack.enter_context(waiting_in_host(case.is_copied))
        compiled, optimizer = made(case, seed=rank)
        losses = losses_of(case, compiled, optimizer, range(case.steps), rank, size)
    return losses, {name: p.detach().clone() for name, p in compiled.named_parameters()}


def on_rank(case: Case) -> tuple[list[float], dict[str, Tensor]]:
    """`trained`, as one of several ranks."""
    return trained(case, dist.get_rank(), dist.get_world_size())

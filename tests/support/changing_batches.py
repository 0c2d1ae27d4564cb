"""Training on batches of changing sizes while a tracker watches the budget: shared by the tests of plans."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.copies.residency import Residency
from chunkft_fx.errors import BudgetInfeasible
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.runtime.session import Session
from tests.support.forced_splits import unsplit
from tests.support.live_storages import LiveStorages

VOCABULARY = 60


class Text(nn.Module):
    """A small language model; an image, if there is one, is added to each token. Given labels it returns the loss."""

    def __init__(self, width: int = 16, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.vision = nn.Linear(8, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, labels: Tensor, image: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        if image is not None:
            x = x + torch.tanh(self.vision(image)).mean(1)[:, None]
        for layer in self.layers:
            x = x + layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def text(rows: int, length: int, pixels: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """A batch of ``rows`` sequences, with images of so many ``pixels`` if that is given."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    batch = {"ids": ids, "labels": ids.clone()}
    return batch if pixels is None else batch | {"image": torch.randn(rows, pixels, 8, generator=generator)}


def compiled(model: nn.Module, budget: int | str, **options: Any) -> CompiledModule:
    """With turns of one step, unless the coverage is left open, which a given interval would decide."""
    usual = {} if options.get("coverage") == "auto" else {"interval": 1}
    return chunkft_fx.compile(copy.deepcopy(model).train(), budget, backend="eager", **{**usual, **options})


def smallest(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> int:
    """The smallest budget for a batch that is not split."""
    with unsplit(), pytest.raises(BudgetInfeasible) as caught:
        compiled(model, 1, **options)(**batch)
    return caught.value.smallest_budget_bytes


@contextmanager
def watched(module: CompiledModule, batch: dict[str, Tensor]) -> Iterator[Callable[[], int]]:
    """While inside, all that calls of a module make is tracked; gives the bytes that it had on the device at most.

    States are counted as the stage for the largest chunk, as if the model ran on a GPU.
    """
    tracker = LiveStorages()
    tracker.watch(s.grad for s in module._training._slices or () if s.grad is not None)
    ring = module._training.engines._ring
    tracker.watch(ring._buffers if ring is not None else ())
    call, finish, ghost = Session.__call__, Session.finish, Residency._ghost

    def ghost_without_memory(self: Residency, name: str, like: Tensor) -> Tensor:
        made = ghost(self, name, like)
        tracker.forget(made)
        return made

    def tracked_call(self: Session, *arguments: Any) -> tuple[Any, ...]:
        with tracker:
            return call(self, *arguments)

    def tracked_finish(
        self: Session, step: Any, gradients: Sequence[Mapping[str, Tensor]], asked: Any
    ) -> list[Tensor | None]:
        tracker.watch(g for came in gradients for g in came.values())
        with tracker:
            return finish(self, step, gradients, asked)

    def most() -> int:
        on_device = [p for n, p in module.named_parameters() if n not in module.residency.streamed]
        staged = dict(module.plan.terms)["optimizer state of the active chunk"]
        tensors = [*on_device, *module.buffers(), *batch.values()]
        return sum(t.nbytes for t in tensors) + staged + tracker.peak_nbytes

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Session, "__call__", tracked_call)
        patched.setattr(Session, "finish", tracked_finish)
        patched.setattr(Residency, "_ghost", ghost_without_memory)
        yield most


def state_of(module: CompiledModule) -> list[Any]:
    """All that a refused call must leave as it was."""
    weights = [p.detach().clone() for p in module.parameters()]
    gradients = [None if s.grad is None else s.grad.clone() for s in module._training._slices or ()]
    schedule = None if module._training._schedule is None else module._training._schedule.state_dict()
    return [weights, gradients, schedule, module._training.known_plan, module.residency.streamed]


def is_same(before: list[Any], after: list[Any]) -> bool:
    tensors = [(a, b) for i in (0, 1) for a, b in zip(before[i], after[i], strict=True)]
    return before[2:] == after[2:] and all((a is b is None) or torch.equal(a, b) for a, b in tensors)


def attempt(module: CompiledModule, batch: dict[str, Tensor]) -> bool:
    """Train on a batch within the budget, or see it refused with nothing changed; says whether it was trained on."""
    before = state_of(module)
    with watched(module, batch) as most:
        try:
            loss = module(**batch)
        except BudgetInfeasible:
            assert is_same(before, state_of(module))
            return False
        loss.backward()
    assert most() <= module.plan.budget_bytes, (most(), {k: v.shape for k, v in batch.items()})
    return True


def evaluate(module: CompiledModule, batch: dict[str, Tensor]) -> None:
    """Evaluate a batch without gradients, within the budget or refused, as soon as a training batch was planned."""
    module.eval()
    before = state_of(module)
    with watched(module, batch) as most, torch.no_grad():
        try:
            module(**batch)
            planned = module._training.known_plan is not None and module._training.known_plan.batch
            assert not planned or most() <= module.plan.budget_bytes
        except BudgetInfeasible:
            assert is_same(before, state_of(module))
    module.train()


def run_sequence(seed: int, share: float, steps: int = 30) -> tuple[int, int]:
    """A random sequence under ``share`` of the smallest budget for 3 x 16; how many batches ran, and were refused."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = Text(width=draw.choice((8, 16)), blocks=draw.choice((2, 4)))
    options: dict[str, Any] = {"chunks": draw.choice(("auto", 3))}
    module = compiled(model, int(smallest(model, text(3, 16), **options) * share), **options)
    optimizer = chunkft_fx.AdamW(module, lr=1e-3, state_dtype=draw.choice(("float32", "bfloat16")))
    counts = [0, 0]
    for step in range(steps):
        rows, length = draw.choice(((draw.randint(2, 4), 16), (3, draw.randint(2, 32)), (draw.randint(2, 8), step + 2)))
        counts[not attempt(module, text(rows, length, seed=step))] += 1
        if draw.random() < 0.3:
            evaluate(module, text(draw.randint(2, 6), draw.randint(2, 32)))
        if draw.random() < 0.6:
            optimizer.step()
            optimizer.zero_grad()
    return counts[0], counts[1]

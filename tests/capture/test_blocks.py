"""Blocks are found whichever way a forward gets at them, and a model whose blocks are not found says so."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.capture.blocks import block_paths
from chunkft_fx.errors import ChunkFTWarning
from tests.support.equivalence import assert_same_gradients

LAYERS = 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers, self.head = (
            nn.Embedding(20, 8),
            nn.ModuleList(Block() for _ in range(LAYERS)),
            nn.Linear(8, 20),
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).pow(2).mean()


def passing_on(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Decorated(Plain):
    forward = passing_on(Plain.forward)


class TwiceDecorated(Plain):
    forward = passing_on(passing_on(Plain.forward))


class DecoratedBlock(Block):
    forward = passing_on(Block.forward)


class WithDecoratedBlocks(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoratedBlock() for _ in range(LAYERS))


class WithClosure(Plain):
    """The blocks are run by a function that holds them in its closure."""

    def __init__(self) -> None:
        super().__init__()
        layers = self.layers

        def run(x: Tensor) -> Tensor:
            for layer in layers:
                x = layer(x)
            return x

        self.run = run

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.run(self.embed(ids))).pow(2).mean()


class WithPartials(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.steps = [functools.partial(layer) for layer in self.layers]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for step in self.steps:
            x = step(x)
        return self.head(x).pow(2).mean()


class Task(nn.Module):
    """A root that contains the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return 2 * self.model(ids)


def partial_forward() -> nn.Module:
    model = Plain()
    model.forward = functools.partial(Plain.forward, model)  # type: ignore[method-assign]
    return model


MAKES: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "decorated": Decorated,
    "decorated twice": TwiceDecorated,
    "decorated blocks": WithDecoratedBlocks,
    "closure": WithClosure,
    "partials of blocks": WithPartials,
    "partial of forward": partial_forward,
    "task": lambda: Task(Plain()),
    "task around a decorated model": lambda: Task(Decorated()),
    "in a sequence": lambda: nn.Sequential(nn.Identity(), Plain()),
    "in a list of one": lambda: nn.Sequential(nn.ModuleDict({"0": nn.Sequential(Plain())})["0"]),
}


@pytest.mark.parametrize("name", MAKES)
def test_blocks_share_a_template_however_they_are_called(name: str) -> None:
    model = MAKES[name]()
    compiled = chunkft_fx.compile(model, "1GB", chunks=2, interval=1, backend="eager")
    batch = torch.randint(0, 20, (2, 5))
    compiled(batch)
    labels = [r.label for r in compiled._training.sessions[-1].programs.outline.regions]
    assert sum(label.endswith(tuple(f"layers.{i}" for i in range(LAYERS))) for label in labels) == LAYERS
    assert len(compiled.templates) == 3


def test_gradients_through_a_decorated_forward_are_the_dense_ones() -> None:
    model = Task(Decorated())
    compiled = chunkft_fx.compile(model, "1GB", chunks=2, interval=1, backend="eager")
    assert_same_gradients(compiled, model, {"ids": torch.randint(0, 20, (2, 5))}, 1e-6)


def test_a_numbered_module_without_siblings_is_looked_into() -> None:
    assert block_paths(nn.Sequential(nn.Linear(2, 2), Plain()).named_modules()) == tuple(
        f"1.layers.{i}" for i in range(LAYERS)
    )
    assert block_paths(nn.Sequential(Plain(), Plain()).named_modules()) == ("0", "1")


class Unseen(Plain):
    """Reads the weights of its blocks, and never calls them."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            assert isinstance(layer, Block)
            x = x + nn.functional.linear(x, layer.linear.weight, layer.linear.bias)
        return self.head(x).pow(2).mean()


class UnseenTower(nn.Module):
    """Its tower is never run; its own blocks are not numbered."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.linear = Plain(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sum()


def test_a_model_whose_blocks_are_never_called_warns_once_and_trains() -> None:
    model = Unseen()
    compiled = chunkft_fx.compile(model, "1GB", chunks=1, backend="eager")
    ids = torch.randint(0, 20, (2, 5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled(ids)
        compiled.eval()(ids)
        compiled.train()(ids[:, :3])
    (warning,) = (w for w in caught if issubclass(w.category, ChunkFTWarning))
    assert "3 blocks (the first is layers.0)" in str(warning.message)
    assert_same_gradients(compiled, model, {"ids": ids}, 1e-6)


def test_blocks_that_a_batch_does_not_use_bring_no_warning() -> None:
    compiled = chunkft_fx.compile(UnseenTower(), "1GB", chunks=1, backend="eager")
    compiled(torch.randn(2, 8))  # a warning is an error in all tests

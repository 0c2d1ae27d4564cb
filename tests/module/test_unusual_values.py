"""Values that few models have: complex ones, sparse gradients, odd layouts and empty weights train exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from tests.support.odd_blocks import (
    WIDTH,
    Block,
    Blocks,
    assert_recomputes_exactly,
    assert_trains_exactly,
    blocks_of,
    rows,
)

Make = Callable[[], nn.Module]
Step = Callable[[Any, Tensor], Tensor]


def slow(*values: Any) -> list[Any]:
    """The first value as it is, its relatives marked slow."""
    rest = (v if isinstance(v, tuple) else (v,) for v in values[1:])
    return [values[0], *(pytest.param(*v, marks=pytest.mark.slow) for v in rest)]


def spectrum(block: Any, h: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(block.a(h).sin(), dim=1) * (1 + 2j), n=WIDTH, dim=1)


def complex_scalar(block: Any, h: Tensor) -> Tensor:
    return ((block.a(h) * 2j + block.b(h).sin()) * (0.5 - 1j)).real.contiguous()


def complex_matrix(block: Any, h: Tensor) -> Tensor:
    z = torch.complex(block.a(h), block.b(h))
    return (z @ z.mH @ z).abs()


class Spectra(Blocks):
    """Complex values flow from block to block."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.fft(self.first(x))
        for layer in self.layers:
            z = z + torch.complex(layer(z.real), layer(z.imag))
        return self.last(z.abs()).square().sum()


def made(make: Make, kind: type[Blocks] = Blocks) -> nn.Module:
    torch.manual_seed(0)
    return kind(make).double().train()


def plain(block: Any, h: Tensor) -> Tensor:
    return block.b(block.a(h).sin())


@pytest.mark.parametrize("step", slow(spectrum, complex_scalar, complex_matrix))
def test_complex_values_inside_of_a_block(step: Step) -> None:
    assert_trains_exactly(blocks_of(step), rows())


def test_complex_values_between_blocks() -> None:
    assert_trains_exactly(made(lambda: Block(plain), Spectra), rows(), shared=False)


@pytest.mark.parametrize("step", slow(spectrum, complex_matrix))
def test_complex_values_are_exact_when_computed_again(step: Step) -> None:
    assert_recomputes_exactly(blocks_of(step), rows(64))


class LooksUp(nn.Module):
    """Rows of a table by number; ``sparse=True`` makes the plain model's gradient sparse."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table
        self.layers = nn.ModuleList(Block(plain) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        for layer in self.layers:
            h = h + layer(h)
        return h.square().sum()


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return functional.embedding(x, self.weight, 0, None, 2.0, False, True)


TABLES: list[Make] = [
    lambda: nn.Embedding(10, WIDTH, sparse=True),
    lambda: nn.EmbeddingBag(10, WIDTH, mode="sum", sparse=True),
    lambda: nn.Embedding(10, WIDTH, padding_idx=2, sparse=True),
    Functional,
]


@pytest.mark.parametrize("table", slow(*TABLES))
def test_a_sparse_gradient_becomes_dense_slices_of_the_same_numbers(table: Make) -> None:
    torch.manual_seed(0)
    model = LooksUp(table()).double().train()
    assert_trains_exactly(model, {"x": torch.randint(0, 10, (4, 3))}, shared=False)


class Normed(nn.Module):
    """Batch norm whose input is laid out otherwise than its shape says."""

    def __init__(self, norm: nn.Module, turn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.turn = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), norm, turn

    def forward(self, h: Tensor) -> Tensor:
        return self.b(self.turn(self.norm(self.turn(self.a(h)))).sin())


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(self.convolution(h.to(memory_format=torch.channels_last))).sin()


LAYOUTS: list[tuple[Make, tuple[int, ...]]] = [
    (lambda: Normed(nn.BatchNorm1d(WIDTH), lambda t: t.transpose(1, 2)), (4, 5, WIDTH)),
    (lambda: Normed(nn.GroupNorm(2, WIDTH), lambda t: t.transpose(1, 2)), (4, 5, WIDTH)),
    (lambda: Normed(nn.InstanceNorm1d(WIDTH, affine=True), lambda t: t.transpose(1, 2)), (4, 5, WIDTH)),
    (Convolved, (2, 3, 5, WIDTH)),
]


@pytest.mark.parametrize(
    ("make", "shape"), [LAYOUTS[0], *(pytest.param(*c, marks=pytest.mark.slow) for c in LAYOUTS[1:])]
)
def test_norms_of_transposed_inputs(make: Make, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    assert_trains_exactly(made(make), {"x": torch.randn(shape, dtype=torch.float64)})


class Empty(Block):
    """Weights without elements, in a list and by name."""

    def __init__(self) -> None:
        super().__init__(plain)
        self.rows, self.columns = nn.Parameter(torch.zeros(0, WIDTH)), nn.Parameter(torch.zeros(WIDTH, 0))
        self.listed = nn.ParameterList([torch.randn(WIDTH, WIDTH) for _ in range(2)])
        self.named = nn.ParameterDict({"scale": torch.randn(WIDTH), "mix": torch.randn(WIDTH, WIDTH)})

    def forward(self, h: Tensor) -> Tensor:
        g = self.b(torch.cat([self.a(h), self.rows])) + h[:, :0] @ self.columns.T
        for weight in self.listed:
            g = (g @ weight).sin()
        return (g * self.named["scale"]) @ self.named["mix"]


def reparametrized() -> nn.Module:
    block = Block(plain)
    parametrizations.weight_norm(block.a)
    parametrizations.orthogonal(block.b)
    return block


def spectrally_normed() -> nn.Module:
    block = Block(plain)
    parametrizations.spectral_norm(block.a)
    return block


class Reused(Blocks):
    """A block called twice, and weights that several layers share."""

    def __init__(self, make: Make) -> None:
        super().__init__(make)
        self.layers.append(self.layers[0])
        self.last.weight = self.first.weight
        second = self.layers[1]
        assert isinstance(second, Block)
        second.a.bias = self.first.bias


WEIGHTS: list[tuple[Make, type[Blocks]]] = [
    (Empty, Blocks),
    (reparametrized, Blocks),
    (spectrally_normed, Blocks),
    (lambda: Block(plain), Reused),
]


@pytest.mark.parametrize(
    ("make", "kind"), [WEIGHTS[0], *(pytest.param(*c, marks=pytest.mark.slow) for c in WEIGHTS[1:])]
)
def test_unusual_weights(make: Make, kind: type[Blocks]) -> None:
    # spectral norm moves its buffers at each call, and so does not give the same gradient twice
    shared = kind is Blocks
    assert_trains_exactly(made(make, kind), rows(), shared)

"""Finds out what an optimizer class keeps and needs, by running it on small parameters of its own.

The same steps are taken several ways: by the class as it is, by the class made anew for each step from its states, with
another parameter beside, and with the parameter cut in two. What comes out equal is what this library may do with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from chunkft_fx.errors import OptimizerNotSupported
from chunkft_fx.graph.layout import front
from chunkft_fx.optim.classes.parked import OptimizerClass, State, options_of
from chunkft_fx.optim.states.numbers import Number, number_of
from chunkft_fx.torch_internals import CountedTraffic, version

# RAdam's arithmetic changes at its sixth step.
STEPS = 8
# Elements of the parameters that steps are compared on, and of one that is looked at only: classes that keep states in
# 8 bits do so from 4096 elements on, in blocks of 256.
NUMEL, LARGE_NUMEL = 32, 4096
# The rate of all steps here: at a small one nothing would differ, and at none nothing changes.
RATE = 0.1
# Sizes of the gradients that steps are compared with: what a class does beyond a threshold shows at one of them.
SCALES = (1.0, 1e4, 1e-4)
# How far results may differ, against the largest value, or for weights the largest change.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
# What every update of a low-precision element moves beside the class: the master is compared with its weight (30), and
# rounded (6).
MASTER_NBYTES = 36


@dataclass(frozen=True)
class Kept:
    """One tensor that a class keeps: its dtype, and the dimension in which it has size 1, where it is a mean."""

    dtype: torch.dtype
    mean_over: int | None


@dataclass(frozen=True)
class Findings:
    """What a class does with parameters of one number of dimensions, in one dtype.

    ``tensors`` and ``numbers`` are what it keeps, by name. One that ``is_whole`` needs parameters uncut.
    """

    tensors: Mapping[str, Kept]
    numbers: Mapping[str, Number]
    is_whole: bool


@dataclass(frozen=True)
class _Track:
    """Where some steps have led, from which weights: weights, and the states that are left."""

    weights: list[Tensor]
    states: list[State]
    starts: list[Tensor]


def find(kind: OptimizerClass, options: Mapping[str, Any], dimensions: int, dtype: torch.dtype) -> Findings:
    """Try a class on parameters of so many dimensions.

    Raises `OptimizerNotSupported` with the reason if it cannot be run a parameter at a time, and what the class itself
    raises.
    """
    options = _with_rate(options)
    large = _inputs(dimensions, dtype, 0, LARGE_NUMEL)
    of_large = _kept(_plain(kind, options, [(large[0], large[1][:1])]).states[0], large[0].shape)
    one, other = (_inputs(dimensions, dtype, seed) for seed in (0, 1))
    plain = _plain(kind, options, [one])
    tensors, numbers = _kept(plain.states[0], one[0].shape)
    if of_large != (tensors, numbers):
        raise OptimizerNotSupported("it keeps states of large parameters in another form or dtype than of small ones")
    is_whole = False
    for scale in SCALES:
        own, beside = _scaled(one, scale), _scaled(other, scale)
        plain = _plain(kind, options, [own])
        if not _same(_parked(kind, options, own), plain):
            raise OptimizerNotSupported("it keeps something from step to step that is not in its state")
        both = _plain(kind, options, [beside, own])
        if not _same(_Track(both.weights[1:], both.states[1:], both.starts[1:]), plain):
            raise OptimizerNotSupported("its update of one parameter depends on the others, or is random")
        is_whole |= not all(_is_cut(kind, options, own, plain, dim) for dim in range(dimensions))
    return Findings(tensors, numbers, is_whole)


def _with_rate(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same options with a learning rate at which what differs is seen beside weights of about 1."""
    rate = options.get("lr")
    if isinstance(rate, Tensor):
        return {**options, "lr": torch.full_like(rate, RATE)}
    return {**options, "lr": RATE} if isinstance(rate, float | int) else dict(options)


def _scaled(inputs: tuple[Tensor, list[Tensor]], scale: float) -> tuple[Tensor, list[Tensor]]:
    return inputs[0], [g * scale for g in inputs[1]]


def writes_gradients(kind: OptimizerClass, options: Mapping[str, Any], dimensions: int, dtype: torch.dtype) -> bool:
    """Whether a step changes the gradients that it is given, on the CPU or as on CUDA."""
    weight, gradients = _inputs(dimensions, dtype, 0)
    versions = [version(g) for g in gradients]
    _over_steps(kind.over([weight], _foreach(options)), [gradients])
    return any(version(g) != v for g, v in zip(gradients, versions, strict=True))


def moved_nbytes(kind: OptimizerClass, options: Mapping[str, Any], dimensions: int) -> int:
    """Bytes of memory that the class's operators read and write for an element in float32, in its last step here."""
    weight, gradients = _inputs(dimensions, torch.float32, 0)
    optimizer = kind.over([weight], _foreach(options))
    _over_steps(optimizer, [gradients[:-1]])
    with CountedTraffic(weight.numel()) as traffic:
        _over_steps(optimizer, [gradients[-1:]])
    return traffic.nbytes // weight.numel()


def placed_numbers(
    kind: OptimizerClass, options: Mapping[str, Any], dimensions: int, dtype: torch.dtype, device: torch.device
) -> frozenset[str]:
    """The numbers that the class keeps in the memory of a GPU where parameters are there."""
    weight, gradients = _inputs(dimensions, dtype, 0)
    plain = _plain(kind, options, [(weight.to(device), [gradients[0].to(device)])])
    return frozenset(k for k, v in plain.states[0].items() if isinstance(v, Tensor) and v.device.type == device.type)


def _foreach(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with which the class does on the CPU what it does by default on CUDA."""
    is_free = "foreach" in options and options["foreach"] is None and not isinstance(options.get("lr"), Tensor)
    return dict(options) | ({"foreach": True} if is_free else {})


def require_closureless(kind: OptimizerClass) -> None:
    """Raise `OptimizerNotSupported` for a class that evaluates the model itself."""
    closure = inspect.signature(kind.kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise OptimizerNotSupported("its step() needs a closure, with which it evaluates the model several times")


def _inputs(dimensions: int, dtype: torch.dtype, seed: int, numel: int = NUMEL) -> tuple[Tensor, list[Tensor]]:
    """A weight of about so many elements and the gradients of all steps; its last two dimensions differ in size."""
    columns = 8 if numel < LARGE_NUMEL else 128
    rows = max(2, numel // columns // 2 ** max(dimensions - 2, 0))
    shape = ((), (numel,))[dimensions] if dimensions < 2 else ((2,) * (dimensions - 2) + (rows, columns))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(STEPS + 1, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return drawn[0].clone(), [g.clone() for g in drawn[1:]]


def _plain(
    kind: OptimizerClass, options: Mapping[str, Any], inputs: Sequence[tuple[Tensor, Sequence[Tensor]]]
) -> _Track:
    """Steps by the class as it is."""
    optimizer = kind.over([w.clone() for w, _ in inputs], options)
    parameters = optimizer.param_groups[0]["params"]
    before = options_of(optimizer.param_groups[0])
    _over_steps(optimizer, [[g.clone() for g in gradients] for _, gradients in inputs])
    changed = [k for k, v in options_of(optimizer.param_groups[0]).items() if not _is_equal(v, before.get(k))]
    if changed:
        raise OptimizerNotSupported(f"it keeps numbers that change ({', '.join(changed)}) in its parameter groups")
    strangers = [k for k in optimizer.state if not any(k is p for p in parameters)]
    if strangers:
        raise OptimizerNotSupported("its state has entries that belong to no parameter")
    states = [{k: v for k, v in optimizer.state[p].items() if v is not None} for p in parameters]
    return _Track([p.detach() for p in parameters], states, [w for w, _ in inputs])


def _over_steps(optimizer: torch.optim.Optimizer, gradients: Sequence[Sequence[Tensor]]) -> None:
    for step, given in enumerate(zip(*gradients, strict=True)):
        for p, gradient in zip(optimizer.param_groups[0]["params"], given, strict=True):
            p.grad = gradient
        with _seeded(step):
            optimizer.step()


def _parked(kind: OptimizerClass, options: Mapping[str, Any], inputs: tuple[Tensor, Sequence[Tensor]]) -> _Track:
    """The same steps by the class made anew for each, from the states that it kept."""
    weight, state = inputs[0].clone(), None
    for step, gradient in enumerate(inputs[1]):
        with _seeded(step):
            (state,) = kind.step(options, [weight], [gradient.clone()], [state])
        state = {key: _again(key, value) for key, value in state.items()}
    assert state is not None
    return _Track([weight], [state], [inputs[0]])


def _again(name: str, value: Any) -> Any:
    """A value of a state as it comes back: numbers are made anew."""
    number = number_of(name, value)
    return value if number is None else number.made(value.item() if isinstance(value, Tensor) else value)


def _is_cut(
    kind: OptimizerClass, options: Mapping[str, Any], inputs: tuple[Tensor, Sequence[Tensor]], plain: _Track, dim: int
) -> bool:
    """Whether both parts of a parameter that is cut along ``dim`` become what they are in the whole."""
    weight, gradients = inputs
    size = weight.shape[dim]
    first = size // 2 - size // 8
    for start, length in ((0, first), (first, size - first)):
        cut = partial(_part, weight.shape, dim, start, length)
        try:
            found = _parked(kind, options, (cut(weight), [cut(g) for g in gradients]))
        except (RuntimeError, ValueError, TypeError):
            return False
        whole = {k: cut(v) if isinstance(v, Tensor) else v for k, v in plain.states[0].items()}
        if not _same(found, _Track([cut(plain.weights[0])], [whole], [cut(weight)])):
            return False
    return True


def _part(shape: torch.Size, dim: int, start: int, length: int, t: Tensor) -> Tensor:
    """A part of a tensor of this shape, as an update gets it; others as they are."""
    return front(t, dim).narrow(0, start, length).contiguous() if t.shape == shape else t


def _kept(state: State, shape: Sequence[int]) -> tuple[dict[str, Kept], dict[str, Number]]:
    """What stands in a class's state of a parameter of this shape."""
    means = {(*shape[:-1], 1): -1, (*shape[:-2], 1, *shape[-1:]): -2} if len(shape) > 1 else {}
    tensors: dict[str, Kept] = {}
    numbers: dict[str, Number] = {}
    for name, value in state.items():
        number = number_of(name, value)
        if number is not None:
            numbers[name] = number
        elif type(value) is Tensor and (tuple(value.shape) in means or value.shape == torch.Size(shape)):
            tensors[name] = Kept(value.dtype, means.get(tuple(value.shape)))
        else:
            what = f"{type(value).__name__} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value)
            raise OptimizerNotSupported(
                f"its state {name!r} of a parameter of shape {list(shape)} is a {what}, and only plain tensors of the "
                "parameter's shape, means over one of its last two dimensions, and numbers can be kept for slices"
            )
    return tensors, numbers


def _same(a: _Track, b: _Track) -> bool:
    if [s.keys() for s in a.states] != [s.keys() for s in b.states]:
        return False
    pairs = [(s[k], t[k]) for s, t in zip(a.states, b.states, strict=True) for k in s]
    moved = zip(a.weights, b.weights, b.starts, strict=True)
    return all(_is_close(x, y) for x, y in pairs) and all(_is_moved_alike(*weights) for weights in moved)


def _is_close(a: Any, b: Any) -> bool:
    a, b = (torch.as_tensor(t, dtype=t.dtype if isinstance(t, Tensor) else torch.float64) for t in (a, b))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    tolerance = TOLERANCES.get(a.dtype, 1e-2)
    a, b = a.double(), b.double()
    largest = float(b.abs().max())
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * largest, equal_nan=True)


def _is_moved_alike(a: Tensor, b: Tensor, start: Tensor) -> bool:
    """Whether two weights that began as ``start`` are the same, by how far they moved, and but for their rounding."""
    tolerance = TOLERANCES[a.dtype] * float((b - start).abs().max())
    tolerance += STEPS * torch.finfo(a.dtype).eps * float(b.abs().max())
    return torch.allclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True)


def _is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


@contextmanager
def _seeded(step: int) -> Iterator[None]:
    """A step of its own random numbers, without a trace in those of the user; updates are without gradients."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(step)
        yield

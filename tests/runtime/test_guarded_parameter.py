"""Guarded parameters: what reads or writes their values waits first, what only describes them does not."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chunkft_fx.runtime.guarded_parameter import GuardedParameter, guard, is_guardable, unguard


class Guarded:
    """Two parameters whose values are old until someone waits."""

    def __init__(self) -> None:
        self.matrix, self.vector = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(2))
        self.parameters = [self.matrix, self.vector]
        self.waited = 0
        guard(self.parameters, self.wait)

    def wait(self) -> None:
        self.waited += 1
        unguard(self.parameters)
        with torch.no_grad():
            for p in self.parameters:
                p.fill_(1.0)


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    made = Guarded()
    yield made
    unguard(made.parameters)


def saved(p: Tensor) -> Any:
    buffer = io.BytesIO()
    torch.save(p, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def with_gradient(p: nn.Parameter) -> None:
    p.grad = torch.ones(3, 4)
    assert p.grad is not None
    p.grad = None


READS: dict[str, Callable[[nn.Parameter], Any]] = {
    "arithmetic": lambda p: p + 0,
    "data": lambda p: p.data,
    "detach": lambda p: p.detach(),
    "numpy": lambda p: torch.from_numpy(p.detach().numpy()),
    "dlpack": lambda p: torch.utils.dlpack.from_dlpack(p.detach()),
    "clone": lambda p: p.clone(),
    "to": lambda p: p.to(torch.float64).float(),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda p: pickle.loads(pickle.dumps(p)),
    "save": saved,
    "list": lambda p: torch.tensor(p.tolist()),
    "iteration": lambda p: torch.stack(list(p)),
    "view": lambda p: p.view(-1).view(3, 4),
    "another parameter": nn.Parameter,
    "compiled function": lambda p: torch.compile(lambda w: w * 1.0, backend="eager")(p),
    "index": lambda p: p[:],
    "foreach": lambda p: torch._foreach_add([p, p], 0.0)[1],
    "number": lambda p: torch.full((3, 4), p.detach().sum().item() / 12),
    "module": lambda p: nn.functional.linear(torch.eye(4), p).T,
    "functional_call": lambda p: (
        torch.func.functional_call(nn.Linear(4, 3, bias=False), {"weight": p}, (torch.eye(4),)).T
    ),
    "storage": lambda p: torch.empty(0).set_(p.untyped_storage(), 0, (3, 4), (4, 1)),
    "list of parameters": lambda p: nn.utils.parameters_to_vector([p]).view(3, 4),
    "repr": lambda p: torch.ones(3, 4) if "1., 1." in repr(p) else p,
}
WRITES: dict[str, Callable[[nn.Parameter], Any]] = {
    "copy_": lambda p: p.copy_(torch.full((3, 4), 2.0)),
    "data": lambda p: p.data.fill_(2.0),
    "set data": lambda p: setattr(p, "data", torch.full((3, 4), 2.0)),
    "out": lambda p: torch.add(torch.ones(3, 4), 1.0, out=p),
    "index": lambda p: p.__setitem__(slice(None), 2.0),
}
DESCRIBES: dict[str, Callable[[nn.Parameter], Any]] = {
    "shape": lambda p: (p.shape, p.size(0), p.ndim, p.dim(), p.numel(), p.stride()),
    "kind": lambda p: (p.dtype, p.device, p.layout, p.is_cuda, p.is_leaf, p.requires_grad),
    "gradient": with_gradient,
    "zero_grad": lambda p: torch.optim.SGD([p]).zero_grad(),
    "hash": lambda p: {p: 1}[p],
    "isinstance": lambda p: isinstance(p, nn.Parameter) and isinstance(p, Tensor),
    "registering": lambda p: nn.ParameterList([p]),
}


@pytest.mark.parametrize("kind", READS)
def test_who_reads_sees_what_was_waited_for(guarded: Guarded, kind: str) -> None:
    value = READS[kind](guarded.matrix)
    assert guarded.waited == 1
    assert torch.equal(value, torch.ones(3, 4))
    assert type(guarded.matrix) is type(guarded.vector) is nn.Parameter
    assert type(value) is not GuardedParameter


@pytest.mark.parametrize("kind", WRITES)
def test_who_writes_comes_last(guarded: Guarded, kind: str) -> None:
    with torch.no_grad():
        WRITES[kind](guarded.matrix)
    assert guarded.waited == 1
    assert torch.equal(guarded.matrix, torch.full((3, 4), 2.0))


@pytest.mark.parametrize("kind", DESCRIBES)
def test_who_describes_does_not_wait(guarded: Guarded, kind: str) -> None:
    DESCRIBES[kind](guarded.matrix)
    assert guarded.waited == 0
    assert torch.equal(guarded.vector + 0, torch.ones(2))


def test_a_parameter_that_was_swapped_is_read_without_an_end_of_waiting(guarded: Guarded) -> None:
    other = nn.Parameter(torch.full((2,), 3.0))
    torch.utils.swap_tensors(guarded.vector, other)
    assert torch.equal(guarded.vector + 0, torch.full((2,), 3.0))
    assert (other + 0).shape == (2,)
    assert type(other) is type(guarded.matrix) is nn.Parameter


def test_another_parameter_shares_the_memory_and_is_like_one_made_in_the_open(guarded: Guarded) -> None:
    made = nn.Parameter(guarded.matrix, requires_grad=False)
    assert type(made) is nn.Parameter
    assert made.data_ptr() == guarded.matrix.data_ptr()
    assert (made.requires_grad, made.is_leaf, nn.Parameter(guarded.vector).requires_grad) == (False, True, True)


def test_the_class_of_a_guarded_parameter_makes_parameters_that_are_not(guarded: Guarded) -> None:
    made = type(guarded.matrix)(torch.ones(2), requires_grad=False)
    assert type(made) is nn.Parameter
    assert not made.requires_grad


def test_what_nobody_holds_is_freed_with_what_waits_for_it() -> None:
    one, other = Guarded(), Guarded()
    kept, freed = one.matrix, weakref.ref(other)
    del one, other
    gc.collect()
    assert freed() is None
    assert torch.equal(kept + 0, torch.ones(3, 4))  # who holds one parameter still gets what it waits for


def test_all_parameters_are_waited_for_whichever_is_read() -> None:
    one, other = Guarded(), Guarded()
    assert torch.equal(one.matrix + 0, torch.ones(3, 4))
    assert (one.waited, other.waited) == (1, 1)


def test_parameters_of_other_classes_are_not_guarded() -> None:
    class Own(nn.Parameter):
        pass

    assert is_guardable(nn.Parameter(torch.ones(2)))
    assert not is_guardable(Own(torch.ones(2)))
    assert not is_guardable(torch.ones(2))

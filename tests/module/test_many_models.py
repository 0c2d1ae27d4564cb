"""A process compiles any number of models, with any number of shapes, and keeps nothing of those that are gone."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import chunkft_fx

# Before so many models, torch still fills tables of its own that end somewhere (it keeps 64 records of compilations).
WARM_UP = 20
# What a compilation is made of: none of it may outlive its model.
PARTS = ("Session", "Graph", "GraphModuleImpl", "FakeTensor", "ShapeEnv", "CheckFunctionManager", "CompiledModule")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


IDS = torch.arange(12).view(2, 6)


def one_model() -> weakref.ref[nn.Module]:
    """Compile a model, train and evaluate it once; returns what tells whether it is gone."""
    model = Net()
    compiled = chunkft_fx.compile(model, "1GB", chunks=2, interval=1, backend="eager")
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-3)
    ids = IDS.clone()
    compiled(ids).backward()
    optimizer.step()
    with torch.no_grad():
        compiled.eval()(ids)
    return weakref.ref(model)


def parts() -> Counter[str]:
    gc.collect()
    gc.collect()
    return Counter(name for o in gc.get_objects() if (name := type(o).__name__) in PARTS)


def resident_bytes() -> int:
    """What the process holds of memory, after all that is unused was given back to the system."""
    gc.collect()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_nothing_of_a_dropped_model_is_kept() -> None:
    """More models of one class than torch compiles of one function (8), each dropped before the next."""
    one_model()
    before = parts()
    gone = [one_model() for _ in range(9)]  # torch compiles a function for 8
    after = parts()
    assert not any(reference() for reference in gone)
    assert after - before == Counter()


def test_models_of_one_class_live_side_by_side() -> None:
    models = [Net() for _ in range(9)]
    compiled = [chunkft_fx.compile(m, "1GB", chunks=1, backend="eager") for m in models]
    for model, own in zip(models, compiled, strict=True):
        loss = own(IDS)
        loss.backward()
        torch.testing.assert_close(loss, model(IDS))
        assert len(own._training.sessions) == 1


class Counting(Net):
    """A number that changes with every call makes a graph of its own each time."""

    step = 0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * (self.step + 1)


def test_no_number_of_recompilations_is_too_many() -> None:
    model = Counting()
    compiled = chunkft_fx.compile(model, "1GB", chunks=1, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=2):
        base = float(compiled(IDS))
        for step in range(1, 10):
            model.step = step
            assert float(compiled(IDS)) == pytest.approx((step + 1) * base)


def test_dropping_a_model_leaves_another_compiled() -> None:
    kept = chunkft_fx.compile(Net(), "1GB", chunks=1, backend="eager")
    kept(IDS).backward()
    one_model()
    gc.collect()
    kept(IDS).backward()
    assert len(kept._training.sessions) == 1


def _grown() -> None:
    """What `test_memory_stays_flat_over_200_models` runs in a process of its own."""
    torch.set_num_threads(1)
    for _ in range(WARM_UP):
        one_model()
    before = resident_bytes()
    for _ in range(200 - WARM_UP):
        one_model()
    print(before, resident_bytes())  # noqa: T201 - read by the test


@pytest.mark.slow
def test_memory_stays_flat_over_200_models() -> None:
    """In a process of its own: pytest keeps what torch logs in a test, 0.7 MB a model."""
    command = [sys.executable, "-c", "from tests.module.test_many_models import _grown; _grown()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after < 1.05 * before

"""Graphs of the first step are lowered in a thread while its plan is settled; errors surface in the step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import chunkft_fx
from chunkft_fx.planning import batch_plan
from chunkft_fx.program import lower
from chunkft_fx.runtime.lower_ahead import THREAD


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(layer(x))
        return x.square().mean()


class Compiler:
    """Stands for Inductor: graphs run as they are; it notes the thread that each was compiled in."""

    def __init__(self, fails: Callable[[], bool] = lambda: False) -> None:
        self.threads: list[str] = []
        self._fails = fails

    def __call__(self, module: fx.GraphModule, _mode: Any, is_backward: bool) -> Any:
        assert not torch.is_grad_enabled()
        self.threads.append(threading.current_thread().name)
        if self._fails():
            raise RuntimeError("this graph is not for compiling")
        runnable = fx.GraphModule(module, module.graph)
        return lambda inputs: runnable(*inputs)


def compiled(monkeypatch: pytest.MonkeyPatch, compiler: Compiler, **options: Any) -> Any:
    monkeypatch.setattr(lower, "compile_graph", compiler)
    return chunkft_fx.compile(Net(), 10**9, backend="inductor", **{"chunks": 3, "interval": 1, **options})


def is_ahead() -> bool:
    return threading.current_thread().name == THREAD


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_all_graphs_of_the_first_step_are_lowered_before_it_runs(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    compiler = Compiler()
    model = compiled(monkeypatch, compiler, order=order)
    x = torch.randn(2, 5)
    loss = model(x)
    loss.backward()
    assert compiler.threads
    assert set(compiler.threads) == {THREAD}
    torch.testing.assert_close(loss, model._training.plain(x))


def test_what_cannot_be_lowered_raises_in_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(lambda: True)
    model = compiled(monkeypatch, compiler)
    with pytest.raises(RuntimeError, match="not for compiling"):
        model(torch.randn(2, 5))
    assert compiler.threads == [THREAD, threading.main_thread().name]


def test_what_fails_ahead_alone_is_lowered_by_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled(monkeypatch, Compiler(is_ahead))
    x = torch.randn(2, 5)
    torch.testing.assert_close(model(x), model._training.plain(x))


def test_a_plan_that_cannot_be_settled_ends_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, failed = threading.Event(), threading.Event()

    def waits() -> bool:
        begun.set()
        assert failed.wait(10)
        time.sleep(0.2)  # in which the exception arrives
        return False

    def refuse(*_: object) -> None:
        assert begun.wait(10)
        failed.set()
        raise MemoryError("no room")

    compiler = Compiler(waits)
    model = compiled(monkeypatch, compiler)
    with monkeypatch.context() as patched:
        patched.setattr(batch_plan, "settle", refuse)
        with pytest.raises(MemoryError, match="no room"):
            model(torch.randn(2, 5))
    assert all(t.name != THREAD for t in threading.enumerate())
    assert compiler.threads == [THREAD]
    x = torch.randn(2, 5)
    torch.testing.assert_close(model(x), model._training.plain(x))


def test_a_saved_position_leaves_lowering_to_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler()
    begun = compiled(monkeypatch, compiler, chunks=1)
    resumed = compiled(monkeypatch, compiler, chunks="auto")
    resumed._training.resume(begun._training.schedule.state_dict())
    resumed(torch.randn(2, 5))
    assert set(compiler.threads) == {threading.main_thread().name}

"""The compiled module in the model's place: its class, attributes and signature; calls from several threads."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.utils import find_labels

from chunkft_fx.module.module import CompiledModule
from chunkft_fx.tools.zoo import tiny
from tests.support.forced_streaming import streaming
from tests.support.tiny_lm import TinyLM, lm_batch, lm_compiled, tiny_lm


def test_it_passes_for_an_instance_of_the_models_class() -> None:
    model, batch = tiny("llama")
    compiled = lm_compiled(model)
    assert isinstance(compiled, LlamaForCausalLM)
    assert isinstance(compiled, PreTrainedModel)
    assert isinstance(compiled, CompiledModule)
    assert compiled.__class__.__name__ == "LlamaForCausalLM"
    assert find_labels(compiled.__class__) == ["labels"]
    assert inspect.signature(compiled.forward) == inspect.signature(model.forward)
    assert not isinstance(compiled, TinyLM)
    assert type(pickle.loads(pickle.dumps(compiled))) is type(copy.deepcopy(compiled)) is type(compiled)
    assert compiled(**batch(2, 5, 0)).loss.requires_grad


def test_what_is_set_on_it_reaches_the_model() -> None:
    compiled = lm_compiled()
    plain = float(compiled(**lm_batch()).detach())
    compiled.scale = 3.0
    assert compiled._model.scale == 3.0
    assert float(compiled(**lm_batch()).detach()) != plain
    del compiled.scale
    assert float(compiled(**lm_batch()).detach()) == plain
    compiled.note = "mine"
    assert compiled._model.note == compiled.note == "mine"
    assert "note" in dir(compiled)
    compiled.head = nn.Linear(8, 13, bias=False)
    assert compiled._model.head is compiled.head
    with pytest.raises(AttributeError):
        _ = compiled.nothing


def test_what_it_has_itself_stays_its_own() -> None:
    compiled = lm_compiled()
    calls: list[int] = []
    forward = compiled.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    compiled.forward = counted
    compiled(**lm_batch()).backward()
    assert calls == [1]
    assert "forward" not in vars(compiled._model)
    handle = compiled.register_forward_hook(lambda *_: calls.append(2))
    compiled(**lm_batch())
    assert calls == [1, 1, 2]
    handle.remove()
    compiled.eval()
    assert not compiled.training and not compiled._model.training


def together(*work: Any) -> None:
    failures: list[BaseException] = []

    def guarded(f: Any) -> None:
        try:
            f()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(f,)) for f in work]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("share", ["all", "mixed"])
def test_evaluation_of_streamed_weights_from_threads_is_right(share: str) -> None:
    model = tiny_lm()
    plain = copy.deepcopy(model)
    batches = [lm_batch(seed) for seed in range(3)]
    with streaming(share):
        compiled = lm_compiled(model)
        compiled(**batches[0])

        def evaluate(batch: dict[str, Tensor]) -> None:
            for _ in range(30):
                with torch.no_grad():
                    torch.testing.assert_close(compiled(**batch), plain(**batch))

        together(*[lambda b=b: evaluate(b) for b in batches])


def test_backward_and_forward_of_two_threads_add_up() -> None:
    compiled = lm_compiled(chunks=1)
    plain = copy.deepcopy(compiled._model)
    batches = [lm_batch(seed) for seed in range(2)]

    def train(batch: dict[str, Tensor]) -> None:
        for _ in range(10):
            compiled(**batch).backward()

    together(*[lambda b=b: train(b) for b in batches])
    (10 * (plain(**batches[0]) + plain(**batches[1]))).backward()
    for s in compiled.active_slices():
        torch.testing.assert_close(s.grad, plain.get_parameter(s.name).grad)

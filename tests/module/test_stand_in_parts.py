"""The module that stands in for a model has its mode, hooks, items and ways of loading too."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import chunkft_fx
from chunkft_fx.module.module import CompiledModule
from tests.support.tiny_lm import TinyLM, lm_batch, lm_compiled, tiny_lm


class Noted(TinyLM):
    """Its mode counts, and it has a way of its own to save and load something."""

    def __init__(self) -> None:
        super().__init__()
        self.note, self.seen = 1, 0
        register: Any = self.register_load_state_dict_pre_hook
        register(self._count)

    def _count(self, *args: Any) -> None:
        self.seen += 1

    def get_extra_state(self) -> int:
        return self.note

    def set_extra_state(self, state: int) -> None:
        self.note = state

    def forward(self, ids: Tensor | None = None, labels: Tensor | None = None, embeds: Tensor | None = None) -> Tensor:
        return super().forward(ids, labels, embeds) * (2.0 if self.training else 1.0)


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def _halve(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output * 0.5


def test_there_is_one_mode_whoever_sets_it() -> None:
    torch.manual_seed(0)
    model = Noted()
    plain, compiled = copy.deepcopy(model), lm_compiled(model)
    model.eval()
    assert not compiled.training
    assert torch.equal(compiled(**lm_batch()), plain.eval()(**lm_batch()))
    compiled.training = plain.training = True
    assert model.training
    assert torch.equal(compiled(**lm_batch()), plain(**lm_batch()))
    nn.ModuleList([compiled]).eval()
    assert not any(m.training for m in [model, *model.modules()])


def test_a_module_around_it_loads_it_in_the_models_own_way() -> None:
    compiled: Any = lm_compiled(Noted())
    around = nn.ModuleList([compiled])
    saved = {k: v if k.endswith("_extra_state") else v * 2 for k, v in around.state_dict().items()}
    saved["0._extra_state"] = 5
    around.load_state_dict(saved)
    assert (compiled.note, compiled.seen) == (5, 1)
    assert torch.equal(compiled.head.weight, saved["0.head.weight"])


def test_hooks_on_state_dicts_are_called_wherever_they_were_registered() -> None:
    model = tiny_lm()
    compiled = lm_compiled(model)
    called: list[str] = []
    for m in (compiled, model):
        m.register_state_dict_pre_hook(lambda *_: called.append("before saving"))
        m.register_state_dict_post_hook(lambda *_: called.append("saved"))
        m.register_load_state_dict_post_hook(lambda *_: called.append("loaded"))
    compiled.load_state_dict(compiled.state_dict())
    assert called == ["before saving"] * 2 + ["saved"] * 2 + ["loaded"] * 2


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_the_hooks_on_the_call(how: Any) -> None:
    compiled = lm_compiled(tiny_lm())
    compiled.register_forward_hook(_halve)
    copied = how(compiled)
    assert isinstance(copied, CompiledModule)
    assert torch.equal(copied(**lm_batch()), tiny_lm()(**lm_batch()) * 0.5)


def test_items_are_the_models() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    compiled: Any = chunkft_fx.compile(model, "1GB", chunks=2, interval=1, backend="eager")
    assert compiled[0] is model[0]
    assert len(compiled) == 2
    assert list(compiled) == list(model)
    compiled[1] = nn.Linear(4, 2)
    compiled(torch.ones(2, 3)).sum().backward()
    assert compiled.active_slices()[0].grad is not None
    named: Any = chunkft_fx.compile(_Named({"a": nn.Linear(3, 4)}), "1GB", chunks=1, backend="eager")
    assert "a" in named
    assert named["a"] is named.a


class _Named(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self["a"](x)
        return result


def test_a_model_without_items_has_none() -> None:
    compiled = lm_compiled(tiny_lm())
    assert compiled
    with pytest.raises(TypeError, match="TinyLM"):
        len(compiled)
    with pytest.raises(TypeError, match="TinyLM"):
        compiled[0]


def test_a_parameter_of_the_model_itself_can_be_parametrized() -> None:
    class Scaled(TinyLM):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(3))

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs) * self.factor.sum()

    torch.manual_seed(0)
    model = Scaled()
    plain, compiled = copy.deepcopy(model), lm_compiled(model, chunks=1)
    for m in (compiled, plain):
        parametrize.register_parametrization(m, "factor", _Doubled())
        m(**lm_batch()).backward()
    for p, q in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)

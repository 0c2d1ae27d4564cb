"""The class of a compiled module: called and signed as the model's, whatever kind of class that is."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import weakref
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel
from transformers.utils import can_return_loss, find_labels

import chunkft_fx
from chunkft_fx.errors import AlreadyCompiled, DistributedNotSupported
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.tools.zoo import tiny
from tests.support.tiny_lm import TinyLM, lm_batch, lm_compiled, tiny_lm


def test_its_class_is_called_and_signed_as_the_models() -> None:
    model, _ = tiny("llama")
    compiled, kind = lm_compiled(model), type(model)
    ours: Any = type(compiled)
    assert issubclass(ours, CompiledModule)
    assert isinstance(compiled, kind) and isinstance(compiled, PreTrainedModel)
    assert (ours.__name__, ours.__qualname__, ours.__module__) == (kind.__name__, kind.__qualname__, kind.__module__)
    assert ours.__doc__ == kind.__doc__
    assert repr(ours) == f"<CompiledModule of {kind!r}>"
    assert repr(CompiledModule) == "<class 'chunkft_fx.module.module.CompiledModule'>"
    assert inspect.signature(ours.forward) == inspect.signature(kind.forward)
    assert find_labels(ours) == ["labels"]
    assert not can_return_loss(ours)


def test_class_attributes_are_those_of_the_models_class() -> None:
    model, _ = tiny("llama")
    ours, kind = type(lm_compiled(model)), type(model)
    for name in ("main_input_name", "_tied_weights_keys", "supports_gradient_checkpointing", "config_class"):
        assert getattr(ours, name) == getattr(kind, name)
    assert ours.from_pretrained.__self__ is kind
    with pytest.raises(AttributeError, match="LlamaForCausalLM"):
        _ = ours.nothing
    with pytest.raises(AttributeError, match="CompiledModule"):
        _ = CompiledModule.main_input_name


def test_models_of_a_class_share_a_class_and_those_of_others_do_not() -> None:
    assert type(lm_compiled()) is type(lm_compiled())
    assert type(lm_compiled()) is not type(lm_compiled(_Saying()))


class _Saying(TinyLM):
    """Its methods and properties say whom they run on, and some have the names of a module's own."""

    @property
    def me(self) -> Any:
        return self

    def who(self) -> Any:
        return self

    @classmethod
    def kind(cls) -> type:
        return cls

    def train(self, mode: bool = True) -> Any:
        self.trained = mode
        return super().train(mode)


def test_the_models_methods_run_on_the_model() -> None:
    model = _Saying()
    compiled = lm_compiled(model)
    assert compiled.who() is compiled.me is model
    assert compiled.kind() is type(compiled).kind() is _Saying
    assert compiled.eval() is compiled
    assert model.trained is False
    with pytest.raises(AttributeError):
        compiled.me = 3
    compiled.who = 4  # a method of the model's class, replaced as on the model
    assert model.who == 4 and "who" not in vars(compiled)


class _Registry(type):
    made: ClassVar[list[str]] = []

    def __init__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> None:
        super().__init__(name, bases, body)
        _Registry.made.append(name)


class _Registered(TinyLM, metaclass=_Registry):
    pass


class _Final(TinyLM):
    def __init_subclass__(cls) -> None:
        raise TypeError("this class has no subclasses")


class _Slotted(TinyLM):
    __slots__ = ("spare",)

    def __init__(self) -> None:
        super().__init__()
        self.spare = 2


class _Handing(TinyLM):
    """Hands on what it has not, writes down what is set, and has a call of its own."""

    def __init__(self) -> None:
        self.__dict__["written"] = []
        super().__init__()

    def __getattr__(self, name: str) -> Any:
        return "handed on" if name == "distant" else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.written.append(name)
        super().__setattr__(name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().__call__(*args, **kwargs)


@pytest.mark.parametrize("kind", [_Registered, _Final, _Slotted, _Handing])
def test_unusual_classes_train_as_the_plain_model(kind: Any) -> None:
    torch.manual_seed(0)
    model = kind()
    plain = kind()
    plain.load_state_dict(model.state_dict())
    made = list(_Registry.made)
    compiled = lm_compiled(model, chunks=1)
    assert _Registry.made == made
    assert isinstance(compiled, kind) and type(compiled).__name__ == kind.__name__
    ours, theirs = compiled(**lm_batch()), plain(**lm_batch())
    torch.testing.assert_close(ours, theirs)
    ours.backward(), theirs.backward()
    for p, q in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_slots_and_attributes_that_are_handed_on_are_the_models() -> None:
    slotted, handing = lm_compiled(_Slotted()), lm_compiled(_Handing())
    slotted.spare = 5
    assert slotted.spare == slotted._model.spare == 5
    assert handing.distant == "handed on"
    handing.note = 1
    assert handing._model.written[-1] == "note"


class _Chain(nn.Sequential):
    pass


def test_a_container_has_items_and_a_signature() -> None:
    model = _Chain(nn.Linear(3, 4), nn.Linear(4, 1))
    compiled: Any = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager")
    assert isinstance(compiled, nn.Sequential)
    assert len(compiled) == 2 and compiled[-1] is model[1] and list(compiled) == list(model)
    assert list(inspect.signature(type(compiled).forward).parameters) == ["self", "input"]


def test_copies_and_saved_ones_have_the_class_too() -> None:
    compiled = lm_compiled()
    saved = io.BytesIO()
    torch.save(compiled, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(compiled),
        pickle.loads(pickle.dumps(compiled)),
        torch.load(saved, weights_only=False),
    ]
    for made in copies:
        assert type(made) is type(compiled)
        assert torch.equal(made(**lm_batch()), tiny_lm()(**lm_batch()))


def test_a_copy_of_a_model_that_copies_itself_is_compiled_too() -> None:
    x = torch.linspace(-1, 1, 6).view(2, 3)
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)))
    compiled = lm_compiled(model, chunks=1)
    copied = copy.deepcopy(compiled)
    assert isinstance(copied, CompiledModule)
    torch.testing.assert_close(copied(x), model(x))
    assert copied.get_submodule("0") is not compiled.get_submodule("0")


def test_a_class_that_is_gone_is_let_go() -> None:
    def made() -> weakref.ref[type]:
        kind = type("Passing", (TinyLM,), {})
        assert type(lm_compiled(kind())).__name__ == "Passing"
        return weakref.ref(kind)

    gone = made()
    for _ in range(3):  # classes are in cycles of their own: that of the stand-in goes first
        gc.collect()
    assert gone() is None


def test_the_call_is_the_compiled_one_by_every_way() -> None:
    compiled: Any = lm_compiled()
    by_class = type(compiled).forward(compiled, **lm_batch())
    del compiled.forward  # as code does that had put its own there
    for loss in (by_class, compiled.forward(**lm_batch()), compiled(**lm_batch())):
        loss.backward()
        assert compiled._training.arrivals.through and compiled.active_slices()[0].grad is not None
        compiled.zero_grad()
    with pytest.raises(AlreadyCompiled):
        chunkft_fx.compile(compiled, "1GB", chunks=1)


def test_a_lightning_module_keeps_its_methods() -> None:
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_lm()

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            loss: Tensor = self.model(ids, labels)
            return loss

    model = Lit()
    compiled: Any = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager")
    assert isinstance(compiled, lightning.LightningModule)
    assert find_labels(type(compiled)) == ["labels"]
    assert compiled.device == torch.device("cpu") and compiled.global_step == 0
    compiled(**lm_batch()).backward()
    assert compiled.active_slices()[0].grad is not None


def test_data_parallel_is_refused_where_it_copies_the_model() -> None:
    with pytest.raises(DistributedNotSupported, match="DataParallel"):
        torch.nn.parallel.replicate(_no_weights_moved(lm_compiled()), [0, 1])


def _no_weights_moved(module: nn.Module) -> nn.Module:
    """Without weights there is nothing to copy to GPUs before the modules are."""
    module._parameters.clear()
    for child in module.modules():
        child._parameters.clear()
    return module

"""What holds of updates that are done beside what follows their step, whatever the device."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import chunkft_fx
from chunkft_fx.errors import PartialStep, StaleBackward
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.optim.states.pieces import PieceUpdates
from chunkft_fx.plan import pieces
from chunkft_fx.runtime import late_updates
from tests.runtime.test_full_coverage import Tied, batch
from tests.support.waiting import waiting_in_host

Trained = tuple[CompiledModule, chunkft_fx.AdamW]


def is_running(compiled: CompiledModule) -> bool:
    """Whether the last update of a step was not put yet, or is not done."""
    late = compiled._training.late
    if len(late._events) < late._count:
        return True
    last = late._events[-1] if late._events else None
    return last is not None and not last.query()


def evaluated(model: CompiledModule, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids)
    return found


def in_evaluation_mode(model: CompiledModule, ids: Tensor) -> Tensor:
    model.eval()
    found = evaluated(model, ids)
    model.train()
    return found


def another_length(model: CompiledModule, ids: Tensor) -> Tensor:
    found: Tensor = model(ids[:1])
    found.backward()
    model.zero_grad()
    return found


def together(model: CompiledModule, ids: Tensor) -> Tensor:
    losses = model.accumulate([(ids,), (ids.flip(0),)])
    total: Tensor = sum(losses)
    total.backward()
    model.zero_grad()
    return total


def in_inference_mode(model: CompiledModule, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids) + 0


READS: dict[str, Callable[[CompiledModule, chunkft_fx.AdamW], Any]] = {
    "state_dict": lambda model, optimizer: [t.clone() for t in model.state_dict().values()],
    "parameters": lambda model, optimizer: [p.detach().clone() for p in model.parameters()],
    "data": lambda model, optimizer: [p.data.clone() for p in model.parameters()],
    "host": lambda model, optimizer: [p.detach().cpu() for p in model.parameters()],
    "deepcopy": lambda model, optimizer: [copy.deepcopy(p) for p in model.parameters()],
    "pickle": lambda model, optimizer: [pickle.loads(pickle.dumps(p)) for p in model.parameters()],
    "groups": lambda model, optimizer: [p.detach().clone() for g in optimizer.param_groups for p in g["params"]],
    "finish_updates": lambda model, optimizer: finished(model, optimizer),
    "plain call": lambda model, optimizer: [model._training.plain(batch(3).to(next(model.parameters()).device))],
}
CALLS = [evaluated, in_evaluation_mode, another_length, together, in_inference_mode]


def finished(model: CompiledModule, optimizer: chunkft_fx.AdamW) -> list[Tensor]:
    optimizer.finish_updates()
    assert not is_running(model)
    return [p.detach() for p in model.parameters()]


def in_fake_mode(weight: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight.detach()


def in_transform(weight: Tensor) -> None:
    torch.func.grad(lambda x: (x * weight).sum())(torch.ones(weight.shape, device=weight.device))


def in_trace(weight: Tensor) -> None:
    torch.compile(lambda w: w * 2, backend="eager")(weight)


def in_contexts(weight: Tensor) -> None:
    with torch.device("meta"), torch.autocast(weight.device.type, torch.bfloat16), torch.inference_mode():
        weight.detach()


PLACES = [in_fake_mode, in_transform, in_trace, in_contexts]


def written(model: CompiledModule, optimizer: chunkft_fx.AdamW) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)


def zeroed_in_place(model: CompiledModule, optimizer: chunkft_fx.AdamW) -> None:
    optimizer.zero_grad(set_to_none=False)


def scaled_gradients(model: CompiledModule, optimizer: chunkft_fx.AdamW) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(3.0)


def new_gradients(model: CompiledModule, optimizer: chunkft_fx.AdamW) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.copy_(torch.full_like(p.grad, 3.0))


def reloaded(model: CompiledModule, optimizer: chunkft_fx.AdamW) -> None:
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()})
    optimizer.load_state_dict(optimizer.state_dict())


def loaded_optimizer(model: CompiledModule, optimizer: chunkft_fx.AdamW) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def replaced(model: CompiledModule, optimizer: chunkft_fx.AdamW) -> None:
    for module in list(model.modules()):
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias = nn.Parameter(module.bias.detach().clone())


def frozen(model: CompiledModule, optimizer: chunkft_fx.AdamW) -> None:
    next(iter(model.parameters())).requires_grad_(False)


def other_options(model: CompiledModule, optimizer: chunkft_fx.AdamW) -> None:
    for group in optimizer.param_groups:
        group["lr"], group["betas"] = 0.5, (0.1, 0.2)


def stepped_again(model: CompiledModule, optimizer: chunkft_fx.AdamW) -> None:
    optimizer.step()


CHANGES = [
    written, zeroed_in_place, scaled_gradients, new_gradients, reloaded, loaded_optimizer, replaced, frozen,
    other_options, stepped_again,
]  # fmt: skip


class LateCases:
    """Cases of two models that train alike, one with late updates; a test class says on which device."""

    device: str

    def slow(self) -> None:
        """What makes the updates of a step take long, on a device that does them beside."""

    @pytest.fixture(autouse=True)
    def _late(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Small pieces, of which few are put ahead, and not before something takes long."""
        monkeypatch.setattr(pieces, "LARGEST_NBYTES", 2000)
        monkeypatch.setattr(late_updates, "AHEAD", 0 if self.device == "cpu" else 2)
        advance = PieceUpdates._advance

        def slowly(updates: PieceUpdates, step: Any, at: int) -> None:
            if step.parts is not None and at == 0:
                self.slow()
            advance(updates, step, at)

        monkeypatch.setattr(PieceUpdates, "_advance", slowly)
        with waiting_in_host():
            yield

    def made(self, model: nn.Module, update: str, **options: Any) -> Trained:
        compiled = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager", device=self.device)
        assert isinstance(compiled, CompiledModule)
        return compiled, chunkft_fx.AdamW(compiled, lr=1e-2, update=update, **options)

    def pair(self, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Trained, Trained]:
        torch.manual_seed(0)
        model = Tied(dtype)
        return self.made(copy.deepcopy(model), "late", **options), self.made(model, "step", **options)

    def ids(self, step: int) -> Tensor:
        return batch(step).to(self.device)

    def stepped(self, trained: Trained, step: int, count: int = 1) -> Tensor:
        model, optimizer = trained
        for i in range(count):
            loss: Tensor = model(self.ids(10 * step + i))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def same(self, late: Trained, plain: Trained) -> None:
        """Weights and states are equal to the bit."""
        for p, q in zip(late[0].state_dict().values(), plain[0].state_dict().values(), strict=True):
            assert torch.equal(p, q)
        mine, theirs = late[1].state_dict()["state"], plain[1].state_dict()["state"]
        for i, state in mine.items():
            assert all(torch.equal(t, theirs[i][key]) for key, t in state.items() if isinstance(t, Tensor))

    @pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.05}, {"no_decay": ("*bias",)}])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_late_steps_equal_those_at_the_step_to_the_bit(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        late, plain = self.pair(dtype, **options)
        schedules = [torch.optim.lr_scheduler.LinearLR(o, 0.5, total_iters=4) for _, o in (late, plain)]
        for step in range(5):
            expected = self.stepped(plain, step, 1 + step % 3)
            found = self.stepped(late, step, 1 + step % 3)
            for schedule in schedules:
                schedule.step()
            assert is_running(late[0])  # neither step, zero_grad nor the schedule waited
            assert torch.equal(found, expected)
        self.same(late, plain)
        assert not is_running(late[0])

    @pytest.mark.parametrize("kind", READS)
    def test_who_reads_weights_behind_a_step_sees_the_new_ones(self, kind: str) -> None:
        late, plain = self.pair()
        for step in range(2):
            self.stepped(plain, step)
            self.stepped(late, step)
        assert is_running(late[0])
        for p, q in zip(READS[kind](*late), READS[kind](*plain), strict=True):
            assert torch.equal(p, q)
        assert not is_running(late[0])

    @pytest.mark.parametrize("place", PLACES)
    def test_updates_are_the_same_wherever_they_are_waited_for(self, place: Callable[[Tensor], None]) -> None:
        late, plain = self.pair()
        for step in range(2):
            self.stepped(plain, step)
            self.stepped(late, step)
        assert is_running(late[0])
        place(late[0].get_parameter("layers.0.weight"))
        assert not is_running(late[0])
        self.same(late, plain)

    def test_a_thread_that_reads_while_another_waits_sees_the_new_weights(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        late, plain = self.pair()
        for step in range(2):
            self.stepped(plain, step)
            self.stepped(late, step)
        advance, is_half_done, found = PieceUpdates._advance, threading.Event(), list[Tensor]()

        def slowly(updates: PieceUpdates, step: Any, at: int) -> None:
            if at == 3:
                is_half_done.set()
                time.sleep(0.1)
            advance(updates, step, at)

        def read() -> None:
            assert is_half_done.wait(60)
            found.extend(p.detach().cpu() for p in late[0].parameters())

        monkeypatch.setattr(PieceUpdates, "_advance", slowly)
        reader = threading.Thread(target=read)
        reader.start()
        late[1].finish_updates()
        reader.join()
        for p, q in zip(found, plain[0].parameters(), strict=True):
            assert torch.equal(p, q.cpu())

    def test_a_model_that_nobody_holds_is_freed_with_its_updates(self) -> None:
        late, _ = self.pair()
        for step in range(2):
            self.stepped(late, step)
        assert is_running(late[0])
        freed = weakref.ref(late[0]._training), weakref.ref(next(iter(late[0].parameters())))
        del late
        gc.collect()
        assert [ref() for ref in freed] == [None, None]

    @pytest.mark.parametrize("call", CALLS)
    def test_every_kind_of_call_sees_the_new_weights(self, call: Callable[[CompiledModule, Tensor], Tensor]) -> None:
        late, plain = self.pair()
        for step in range(2):
            self.stepped(plain, step)
            self.stepped(late, step)
        assert is_running(late[0])
        assert torch.equal(call(late[0], self.ids(7)), call(plain[0], self.ids(7)))
        for trained in (plain, late):
            self.stepped(trained, 3)
        self.same(late, plain)

    @pytest.mark.parametrize("change", CHANGES)
    def test_what_changes_behind_a_step_changes_nothing_in_it(
        self, change: Callable[[CompiledModule, chunkft_fx.AdamW], None]
    ) -> None:
        late, plain = self.pair()
        for step in range(4):
            for model, optimizer in (plain, late):
                model(self.ids(step)).backward()
                optimizer.step()
                if step == 2:
                    change(model, optimizer)
                optimizer.zero_grad()
        self.same(late, plain)

    def test_a_backward_through_weights_before_the_step_is_refused(self) -> None:
        late, _ = self.pair()
        model, optimizer = late
        weight = next(iter(model.parameters()))
        square = (weight * weight).sum()
        self.stepped(late, 0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.backward()
        first = model(self.ids(1))
        model(self.ids(1)).backward()
        optimizer.step()
        with pytest.raises(StaleBackward):
            first.backward()

    def test_a_late_update_that_fails_leaves_a_partial_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        late, _ = self.pair()
        model, optimizer = late
        for step in range(2):
            self.stepped(late, step)
        model(self.ids(3)).backward()
        advance = PieceUpdates._advance

        def failing(updates: PieceUpdates, step: Any, at: int) -> None:
            if at == 3:
                raise RuntimeError("out of luck")
            advance(updates, step, at)

        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="out of luck"):
            patched.setattr(PieceUpdates, "_advance", failing)
            optimizer.step()
            model(self.ids(4))
        assert not is_running(model)
        with pytest.raises(PartialStep):
            optimizer.state_dict()
        optimizer.zero_grad()
        optimizer.accept_partial_step()
        self.stepped(late, 5)
        assert all(p.isfinite().all() for p in model.parameters())

    def test_an_interrupt_between_two_late_updates_leaves_a_partial_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        late, _ = self.pair()
        for step in range(2):
            self.stepped(late, step)
        put = late[0]._training.late._put
        assert put is not None

        def interrupted(at: int) -> torch.cuda.Event | None:
            event = put(at)
            if at == 3:
                raise KeyboardInterrupt
            return event

        monkeypatch.setattr(late[0]._training.late, "_put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(iter(late[0].parameters())).detach()
        with pytest.raises(PartialStep):
            late[0](self.ids(3)).backward()
            late[1].step()

    def test_a_weight_whose_memory_another_tensor_shares_is_not_late(self) -> None:
        torch.manual_seed(0)
        model = Tied(torch.float32).to(self.device)
        model.register_buffer("alias", next(iter(model.parameters())).data, persistent=False)
        trained = self.made(model, "late")
        for step in range(2):
            self.stepped(trained, step)
        assert not is_running(trained[0])

    def test_parameters_have_their_own_class_again_when_the_model_is_called(self) -> None:
        late, _ = self.pair()
        for step in range(3):
            self.stepped(late, step)
        sessions = len(late[0]._training.sessions)
        assert {type(p) for p in late[0].parameters()} != {nn.Parameter}
        self.stepped(late, 3)
        assert len(late[0]._training.sessions) == sessions  # nothing was traced anew
        late[1].finish_updates()
        assert {type(p) for p in late[0].parameters()} == {nn.Parameter}

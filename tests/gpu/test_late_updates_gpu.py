"""Updates that run on into the next forward on CUDA: nobody sees an old weight, however long they take."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.optim.states.pieces import PieceUpdates
from chunkft_fx.plan import pieces
from tests.runtime.test_full_coverage import Tied, batch
from tests.support.waiting import waiting_in_host

pytestmark = pytest.mark.gpu

SLEEP = 200_000_000  # cycles, about 0.1 s


@pytest.fixture(autouse=True)
def _slow_updates(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small pieces, of which the first update of every late step takes long before it begins."""
    monkeypatch.setattr(pieces, "LARGEST_NBYTES", 2000)
    update_all = PieceUpdates._update_all

    def slow(self: PieceUpdates, order: Any, apart: Any, is_late: bool) -> None:
        if is_late:
            torch.cuda._sleep(SLEEP)
        update_all(self, order, apart, is_late)

    monkeypatch.setattr(PieceUpdates, "_update_all", slow)
    with waiting_in_host():
        yield


def made(model: nn.Module, update: str, **options: Any) -> tuple[CompiledModule, chunkft_fx.AdamW]:
    compiled = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager", device="cuda")
    assert isinstance(compiled, CompiledModule)
    return compiled, chunkft_fx.AdamW(compiled, lr=1e-2, update=update, **options)


def is_running(compiled: CompiledModule) -> bool:
    events = compiled._training.late._events
    return bool(events) and not events[-1].query()


def stepped(compiled: CompiledModule, optimizer: chunkft_fx.AdamW, step: int) -> Tensor:
    loss: Tensor = compiled(batch(step).cuda())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_late_steps_equal_those_at_the_step_to_the_bit(dtype: torch.dtype, clip: float | None) -> None:
    torch.manual_seed(0)
    model = Tied(dtype)
    other = copy.deepcopy(model)
    (late, ours), (plain, theirs) = made(model, "late", max_grad_norm=clip), made(other, "step", max_grad_norm=clip)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 0.5, total_iters=4) for o in (ours, theirs)]
    for step in range(6):
        losses = [stepped(late, ours, step), stepped(plain, theirs, step)]
        assert is_running(late)  # neither step, zero_grad nor the other model's step waited
        for schedule in schedules:
            schedule.step()
        assert torch.equal(*losses)
    assert is_running(late)
    for p, q in zip(late.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(p, q)
    assert not is_running(late)
    mine, their = ours.state_dict()["state"], theirs.state_dict()["state"]
    for i, state in mine.items():
        assert all(torch.equal(t, their[i][key]) for key, t in state.items() if isinstance(t, Tensor))


READS: dict[str, Callable[[CompiledModule, chunkft_fx.AdamW], Any]] = {
    "state_dict": lambda model, optimizer: [t.clone() for t in model.state_dict().values()],
    "parameters": lambda model, optimizer: [p.detach().clone() for p in model.parameters()],
    "data": lambda model, optimizer: [p.data.clone() for p in model.parameters()],
    "host": lambda model, optimizer: [p.detach().cpu() for p in model.parameters()],
    "deepcopy": lambda model, optimizer: [copy.deepcopy(p) for p in model.parameters()],
    "another stream": lambda model, optimizer: on_another_stream(model),
    "finish_updates": lambda model, optimizer: finished(model, optimizer),
    "groups": lambda model, optimizer: [p.detach().clone() for g in optimizer.param_groups for p in g["params"]],
}


def finished(model: CompiledModule, optimizer: chunkft_fx.AdamW) -> list[Tensor]:
    optimizer.finish_updates()
    assert not is_running(model)
    return [p.detach() for p in model.parameters()]


def on_another_stream(model: nn.Module) -> list[Tensor]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = [p.detach().clone() for p in model.parameters()]
    stream.synchronize()
    return found


def pair() -> tuple[tuple[CompiledModule, chunkft_fx.AdamW], tuple[CompiledModule, chunkft_fx.AdamW]]:
    torch.manual_seed(0)
    model = Tied(torch.float32)
    return made(copy.deepcopy(model), "late"), made(model, "step")


@pytest.mark.parametrize("kind", READS)
def test_who_reads_weights_behind_a_step_sees_the_new_ones(kind: str) -> None:
    late, plain = pair()
    for step in range(2):
        stepped(*late, step)
        stepped(*plain, step)
    torch.cuda.current_stream().synchronize()
    assert is_running(late[0])
    for p, q in zip(READS[kind](*late), READS[kind](*plain), strict=True):
        assert torch.equal(p.cuda(), q.cuda())
    assert not is_running(late[0])


def evaluated(model: CompiledModule) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(batch(7).cuda())
    return found


def in_evaluation_mode(model: CompiledModule) -> Tensor:
    model.eval()
    found = evaluated(model)
    model.train()
    return found


def another_length(model: CompiledModule) -> Tensor:
    found: Tensor = model(batch(7)[:1].cuda())
    found.backward()
    model.zero_grad()
    return found


def together(model: CompiledModule) -> Tensor:
    losses = model.accumulate([(batch(7).cuda(),), (batch(8).cuda(),)])
    total: Tensor = sum(losses)
    total.backward()
    model.zero_grad()
    return total


@pytest.mark.parametrize("call", [evaluated, in_evaluation_mode, another_length, together])
def test_every_kind_of_call_sees_the_new_weights(call: Callable[[CompiledModule], Tensor]) -> None:
    late, plain = pair()
    for step in range(2):
        stepped(*late, step)
        stepped(*plain, step)
    assert is_running(late[0])
    assert torch.equal(call(late[0]), call(plain[0]))
    stepped(*late, 3)
    stepped(*plain, 3)
    for p, q in zip(late[0].state_dict().values(), plain[0].state_dict().values(), strict=True):
        assert torch.equal(p, q)


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
            p.grad[:1].zero_()


def reloaded(model: CompiledModule, optimizer: chunkft_fx.AdamW) -> None:
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()})
    optimizer.load_state_dict(optimizer.state_dict())


def replaced(model: CompiledModule, optimizer: chunkft_fx.AdamW) -> None:
    for module in list(model.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            if name == "bias":
                setattr(module, name, nn.Parameter(p.detach().clone()))


def frozen(model: CompiledModule, optimizer: chunkft_fx.AdamW) -> None:
    next(iter(model.parameters())).requires_grad_(False)


@pytest.mark.parametrize("change", [written, zeroed_in_place, scaled_gradients, reloaded, replaced, frozen])
def test_what_changes_behind_a_step_changes_the_new_weights(
    change: Callable[[CompiledModule, chunkft_fx.AdamW], None],
) -> None:
    late, plain = pair()
    for step in range(4):
        for model, optimizer in (late, plain):
            model(batch(step).cuda()).backward()
            optimizer.step()
            if step == 2:
                change(model, optimizer)
            optimizer.zero_grad()
    for p, q in zip(late[0].state_dict().values(), plain[0].state_dict().values(), strict=True):
        assert torch.equal(p, q)


def test_gradients_accumulate_over_passes_behind_a_late_step() -> None:
    late, plain = pair()
    for step in range(4):
        for model, optimizer in (late, plain):
            for i in range(1 + step % 3):
                model(batch(10 * step + i).cuda()).backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(late[0].state_dict().values(), plain[0].state_dict().values(), strict=True):
        assert torch.equal(p, q)


def test_a_weight_whose_memory_another_tensor_shares_is_not_late() -> None:
    torch.manual_seed(0)
    model = Tied(torch.float32).cuda()
    seen = next(iter(model.parameters())).data
    model.register_buffer("alias", seen, persistent=False)
    compiled, optimizer = made(model, "late")
    for step in range(2):
        stepped(compiled, optimizer, step)
    assert not is_running(compiled)


def test_the_forward_begins_before_the_last_updates_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LARGEST_NBYTES", 1 << 26)
    torch.manual_seed(0)
    width, layers = 4096, 12
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers))).bfloat16()
    compiled = chunkft_fx.compile(model, "4GB", coverage="all", backend="eager", device="cuda")
    assert isinstance(compiled, CompiledModule)
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-3, update="late")
    x = torch.randn(8, width, dtype=torch.bfloat16, device="cuda")
    order: list[tuple[bool, ...]] = []
    for step in range(3):
        compiled(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        late = compiled._training.late
        events = list(late._events)
        wait = late.wait
        if step == 2:

            def noted(names: Any, events: list[Any] = events, wait: Any = wait) -> None:
                wait(names)
                torch.cuda.current_stream().synchronize()
                order.append(tuple(e.query() for e in events))

            late.wait = noted  # type: ignore[method-assign]
    compiled(x)
    first, last = order[0], order[-1]
    assert first[0]  # what the first region reads is there
    assert not all(first)  # and it ran before the rest
    assert all(last)

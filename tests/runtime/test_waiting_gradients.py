"""Gradients that wait in host memory for the step: the same numbers as on the device, and the same uses of them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.copies import engines, host_memory
from chunkft_fx.copies.link import CudaLink, Link
from chunkft_fx.copies.states.ring import CopyingRing
from chunkft_fx.copies.tier import HostTier
from chunkft_fx.copies.waiting_gradients import WaitingGradients
from chunkft_fx.errors import HostMemoryExceeded, UnsupportedGraph, WaitingGradientError
from chunkft_fx.gradients.waiting import WaitingGradient
from chunkft_fx.graph import ops
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.optim.states import staging
from chunkft_fx.plan import pieces
from chunkft_fx.runtime import late_updates
from tests.runtime.test_full_coverage import assert_equal, batch, twins
from tests.support.forced_streaming import streaming
from tests.support.stream_machine import Machine, machine
from tests.support.waiting import waiting_in_host

__all__ = ["machine"]

COMPILED = {"coverage": "all", "backend": "eager"}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that they cut tensors."""
    monkeypatch.setattr(pieces, "LARGEST_NBYTES", 1000)
    monkeypatch.setattr(late_updates, "AHEAD", 0)


@pytest.fixture(params=["plain", "copied"])
def host(request: pytest.FixtureRequest) -> Iterator[None]:
    with waiting_in_host(is_copied=request.param == "copied"):
        yield


def compiled(model: nn.Module, **options: Any) -> CompiledModule:
    made = chunkft_fx.compile(model, "1GB", **{**COMPILED, **options})
    assert isinstance(made, CompiledModule)
    return made


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype
        torch.testing.assert_close(value, b[name], rtol=tolerance, atol=tolerance, msg=name)


@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_steps_are_those_of_the_plain_model(data: st.DataObject) -> None:
    """Clipping in both ways, accumulation, frozen and streamed weights, parameters unused in some steps."""
    plain, model = twins(data.draw(st.integers(0, 9)))
    frozen = data.draw(st.sampled_from(["", "layers.0.weight", "embed.weight"]))
    for m in (plain, model):
        for name, p in m.named_parameters():
            p.requires_grad_(name != frozen)
    clip, by_user = data.draw(st.sampled_from([(None, False), (0.05, False), (0.05, True)]))
    is_copied, is_streamed = data.draw(st.booleans()), data.draw(st.booleans())
    with waiting_in_host(is_copied), streaming("all") if is_streamed else nullcontext():
        ours_model = compiled(model)
        update = data.draw(st.sampled_from(["step", "late"]))  # put when they are asked for
        clipped = None if by_user else clip
        ours = chunkft_fx.AdamW(ours_model, lr=1e-2, weight_decay=0.1, max_grad_norm=clipped, update=update)
        theirs = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        for step in range(5):
            micro, scaled = data.draw(st.integers(1, 3)), data.draw(st.booleans())
            to_none = data.draw(st.booleans())
            for i in range(micro):
                (plain(batch(10 * step + i), scaled) / micro).backward()
                (ours_model(batch(10 * step + i), scaled) / micro).backward()
            assert all(isinstance(p.grad, WaitingGradient | None) for p in ours_model.parameters())
            assert_same(gradients(ours_model), gradients(plain), 1e-9)
            if clip is not None:
                norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
                found = torch.nn.utils.clip_grad_norm_(ours_model.parameters(), clip) if by_user else None
                torch.testing.assert_close(norm if found is None else found, norm, rtol=1e-9, atol=0)
            ours.step()
            theirs.step()
            if clip is not None and not by_user:
                torch.testing.assert_close(ours.last_grad_norm, norm, rtol=1e-9, atol=0)
            for o in (ours, theirs):
                o.zero_grad(set_to_none=to_none)
        assert_equal(ours_model, plain, 1e-9)


def late_ring(incoming: Link, depth: int, nbytes: int) -> CopyingRing:
    """A ring over streams of the machine."""
    return CopyingRing(CudaLink(incoming.device), CudaLink(incoming.device), HostTier(incoming.device), depth, nbytes)


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
@pytest.mark.parametrize("seed", range(3))
def test_passes_that_only_accumulate_wait_for_the_backward_that_updates(
    machine: Machine, seed: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They pass through the ring of states, also where states are smaller than gradients, or there are none."""
    plain, model = twins(seed)
    machine.chance = random.Random(seed) if seed else None
    monkeypatch.setattr(staging, "make_ring", late_ring)
    ours = compiled(model)
    optimizer: Any = getattr(chunkft_fx, kind)(ours, lr=1e-2, update="backward")
    theirs = getattr(torch.optim, kind)(plain.parameters(), lr=1e-2)
    for step in range(4):
        held = (seed + step) % 3
        for i in range(held):
            plain(batch(10 * step + i)).backward()
            with ours.no_sync():
                ours(batch(10 * step + i)).backward()
            assert all(isinstance(p.grad, WaitingGradient) for p in ours.parameters())
            assert_same(gradients(ours), gradients(plain), 1e-9)
        if step != 3 or not held:  # a step can also come without a backward that updates
            plain(batch(10 * step + 9)).backward()
            ours(batch(10 * step + 9)).backward()
        for o in (optimizer, theirs):
            o.step()
            o.zero_grad()
    optimizer.state_dict()  # waits for what goes out
    assert_equal(ours, plain, 1e-9)
    assert ours._training.engines._gradients is None
    assert len(ours._training.sessions) == 1  # Dynamo looks at no gradient of ours


@pytest.mark.parametrize("seed", range(4))
def test_steps_are_right_whenever_copies_happen(machine: Machine, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients and states through their rings, over streams that work as late, or as early, as they may."""
    plain, model = twins(seed)
    machine.chance = random.Random(seed) if seed else None
    monkeypatch.setattr(engines, "make_ring", late_ring)
    monkeypatch.setattr(staging, "make_ring", late_ring)
    with waiting_in_host():
        ours = compiled(model)
        optimizers = [chunkft_fx.AdamW(ours, lr=1e-2), torch.optim.AdamW(plain.parameters(), lr=1e-2)]
        for step in range(4):
            for m in (ours, plain):
                for i in range(1 + (seed + step) % 3):
                    m(batch(10 * step + i)).backward()
                torch.nn.utils.clip_grad_norm_(m.parameters(), 0.05)
            for o in optimizers:
                o.step()
                o.zero_grad()
        assert isinstance(optimizers[0], chunkft_fx.AdamW)
        state = optimizers[0].state_dict()["state"]  # waits for what goes out
    assert_equal(ours, plain, 1e-9)
    for i, p in enumerate(plain.parameters()):
        torch.testing.assert_close(state[i]["exp_avg"], optimizers[1].state[p]["exp_avg"], rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_and_weights_equal_those_on_the_device_to_the_bit(dtype: torch.dtype) -> None:
    """Also what is added up over several backward passes, in the dtypes in which the device adds."""
    first, second = twins(dtype=dtype)
    ours = compiled(first)
    one = chunkft_fx.compile(second, "1GB", chunks=1, backend="eager")
    optimizers = [chunkft_fx.AdamW(m, lr=1e-2) for m in (ours, one)]
    for step in range(4):
        for i in range(1 + step % 3):
            for m in (ours, one):
                m(batch(10 * step + i)).backward()
        assert_same(gradients(ours), gradients(one))
        for o in optimizers:
            o.step()
            o.zero_grad()
    assert_equal(ours, one)
    assert len(ours._training.sessions) == 1  # Dynamo looks at no gradient of ours


@pytest.mark.usefixtures("host")
def test_the_first_gradient_of_a_step_waits_as_narrow_as_it_was_made() -> None:
    ours = compiled(twins(dtype=torch.bfloat16)[1])
    for dtype in (torch.bfloat16, torch.float32):
        ours(batch(0)).backward()
        for p in ours.parameters():
            assert isinstance(p.grad, WaitingGradient)
            assert p.grad.dtype == torch.float32
            # a tied weight has two contributions, whose sum is wide
            assert {part.host.dtype for part in p.grad.value.parts if part.host is not None} <= {dtype, torch.float32}
    assert ours._training.gradient_nbytes == 0
    assert ours._training.is_bound


def test_gradients_leave_behind_their_last_contribution() -> None:
    with waiting_in_host():
        ours = compiled(twins()[1])
        ours(batch(0)).backward()
    graph = ours.program.graph
    kept = graph.find_nodes(op="call_function", target=ops.keep)
    tied = [n for n in kept if "embed.weight" in n.meta["names"]]
    assert tied
    assert all(n.meta["names"].count("embed.weight") == 2 for n in tied)
    assert len(kept) == len(ours.plan.policy.pieces)
    assert not graph.find_nodes(op="call_function", target=ops.update)


def scaled(model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad.mul_(0.5)


def changed(model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad.add_(torch.ones_like(p))


def replaced(model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad = p.grad * 0.3


def copied(model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad.copy_(torch.full_like(p, 0.25))


def zeroed(model: nn.Module) -> None:
    model.zero_grad(set_to_none=False)


def many(model: nn.Module) -> None:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    torch._foreach_mul_(grads, 3.0)
    norms = torch._foreach_norm(grads)
    torch._foreach_mul_(grads, torch.stack(list(norms)).sum())


def taken(model: nn.Module) -> None:
    p = model.get_parameter("layers.0.weight")
    assert p.grad is not None
    held, p.grad = p.grad, None
    assert held is not None
    p.grad = held.detach()


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("action", [scaled, changed, replaced, copied, zeroed, many, taken])
def test_what_users_do_to_gradients_counts(action: Callable[[nn.Module], None]) -> None:
    """Between two backward passes, and before the step."""
    plain, model = twins()
    ours = compiled(model)
    optimizers = [chunkft_fx.AdamW(ours, lr=1e-2), torch.optim.AdamW(plain.parameters(), lr=1e-2)]
    for step in range(2):
        for m in (ours, plain):
            m(batch(step)).backward()
            action(m)
            m(batch(step + 5)).backward()
            action(m)
        assert_same(gradients(ours), gradients(plain), 1e-9)
        for o in optimizers:
            o.step()
            o.zero_grad()
    assert_equal(ours, plain, 1e-9)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("clip", [False, True])
def test_a_scaler_unscales_and_skips_steps_that_overflow(clip: bool) -> None:
    plain, model = twins(dtype=torch.float32)
    ours = compiled(model)
    pairs = [
        (m, o, torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2))
        for m, o in (
            (ours, chunkft_fx.AdamW(ours, lr=1e-2)),
            (plain, torch.optim.AdamW(plain.parameters(), lr=1e-2)),
        )
    ]
    for step in range(6):
        for m, o, scaler in pairs:
            loss = m(batch(step)) * (float("inf") if step == 3 else 1.0)
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(o)
                torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1)
            scaler.step(o)
            scaler.update()
            o.zero_grad()
        assert pairs[0][2].get_scale() == pairs[1][2].get_scale()
    assert_equal(ours, plain, 1e-4)


@pytest.mark.usefixtures("host")
def test_gradients_from_outside_of_the_call_are_added() -> None:
    plain, model = twins()
    ours = compiled(model)
    optimizers = [chunkft_fx.AdamW(ours, lr=1e-2), torch.optim.AdamW(plain.parameters(), lr=1e-2)]
    for m in (ours, plain):
        penalised = m.get_parameter("layers.0.weight")
        penalised.square().sum().backward()
        m(batch(0)).backward()
        penalised.square().sum().backward()
        (m(batch(1)) + penalised.square().sum()).backward()
    assert_same(gradients(ours), gradients(plain), 1e-9)
    for o in optimizers:
        o.step()
    assert_equal(ours, plain, 1e-9)


@pytest.mark.usefixtures("host")
def test_another_batch_and_an_evaluation_between_leave_what_waits() -> None:
    plain, model = twins()
    ours = compiled(model)
    for m in (ours, plain):
        m(batch(0)).backward()
        m(batch(1)[:2, :3]).backward()
        m.eval()
        with torch.no_grad():
            m(batch(2))
        m.train()
    assert ours.plan.policy.host_gradients
    assert_same(gradients(ours), gradients(plain), 1e-9)
    other = copy.deepcopy(ours.state_dict())
    assert other.keys() == plain.state_dict().keys()


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("at", [0, 4])
def test_a_backward_that_fails_halfway_spoils_sums_and_says_so(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = twins()
    ours = compiled(model)
    optimizer = chunkft_fx.AdamW(ours, lr=1e-2)
    update, counted = WaitingGradients.update, iter(range(10**6))

    def failing(self: WaitingGradients, *args: Any) -> None:
        if next(counted) == at:
            raise KeyboardInterrupt
        update(self, *args)

    def fail() -> None:
        nonlocal counted
        counted = iter(range(10**6))
        loss = ours(batch(1))
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(WaitingGradients, "update", failing)
            loss.backward()

    fail()
    assert all(p.grad is None for p in ours.parameters())  # as if it had never begun
    ours(batch(0)).backward()
    plain(batch(0)).backward()
    assert_same(gradients(ours), gradients(plain), 1e-9)
    fail()
    if at == 0:
        assert_same(gradients(ours), gradients(plain), 1e-9)
        return
    before = copy.deepcopy(ours.state_dict())
    for use in (
        lambda: torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0),
        lambda: gradients(ours),
        lambda: ours(batch(0)).backward(),
        optimizer.step,
    ):
        with pytest.raises(WaitingGradientError, match="failed"):
            use()
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
    optimizer.zero_grad()
    ours(batch(0)).backward()
    assert_same(gradients(ours), gradients(plain), 1e-9)
    optimizer.step()


@pytest.mark.usefixtures("host")
def test_a_gradient_that_was_taken_off_is_not_another_one() -> None:
    ours = compiled(twins()[1])
    chunkft_fx.AdamW(ours)
    ours(batch(0)).backward()
    p = ours.get_parameter("layers.0.weight")
    old = p.grad
    assert old is not None
    held, copied = old.detach(), copy.deepcopy(old)
    ours.zero_grad()
    assert torch.equal(old.clone(), copied)  # nothing has taken its place
    ours(batch(1)).backward()
    for g in (old, held):
        with pytest.raises(WaitingGradientError, match="another is in its place"):
            g.norm()
    assert p.grad is not None
    assert not torch.equal(p.grad.clone(), copied)
    p.grad = old
    with pytest.raises(WaitingGradientError):
        ours(batch(1)).backward()


@pytest.mark.usefixtures("host")
def test_what_cannot_be_done_while_gradients_wait_is_refused() -> None:
    ours = compiled(twins()[1])
    parameters = dict(ours.named_parameters())
    p, q = parameters["layers.0.weight"], parameters["layers.1.weight"]
    ours(batch(0)).backward()
    seen: list[Tensor] = []
    first, second = p.grad, q.grad
    assert first is not None
    assert second is not None
    uses: list[Callable[[], Tensor]] = [lambda: first[0], lambda: first.view(-1), lambda: first.t()]
    uses.append(lambda: torch.cat([first, second]))
    for use in uses:
        with pytest.raises(WaitingGradientError, match="clone"):
            use()
    handle: Any = p.register_hook(seen.append)
    before = gradients(ours)
    with pytest.raises(UnsupportedGraph, match=r"layers\.0\.weight.*hook"):
        ours(batch(0)).backward()
    handle.remove()
    handle = q.register_post_accumulate_grad_hook(lambda g: None)
    with pytest.raises(UnsupportedGraph, match=r"layers\.1\.weight.*hook"):
        ours(batch(0)).backward()
    handle.remove()
    assert_same(gradients(ours), before)
    p.grad = q.grad
    with pytest.raises(WaitingGradientError, match=r"layers\.1\.weight"):
        ours(batch(0)).backward()


class Square(nn.Module):
    """One layer that is larger than what host memory is given out in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(x).square().mean())


@pytest.mark.usefixtures("host")
def test_host_memory_is_looked_at_before_gradients_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, x = compiled(Square()), torch.ones(2, 64, dtype=torch.bfloat16)
    size = sum(p.nbytes for p in ours.parameters())
    monkeypatch.setattr(host_memory, "available_nbytes", lambda: size - 1)
    with pytest.raises(HostMemoryExceeded, match="gradients that wait"):
        ours(x)
    monkeypatch.setattr(host_memory, "available_nbytes", lambda: size)
    ours(x).backward()
    before = gradients(ours)
    monkeypatch.setattr(host_memory, "available_nbytes", lambda: 0)
    loss = ours(x)
    with pytest.raises(HostMemoryExceeded):  # a sum takes more than its terms
        loss.backward()
    assert_same(gradients(ours), before)
    monkeypatch.setattr(host_memory, "available_nbytes", lambda: size)
    ours(x).backward()
    monkeypatch.setattr(host_memory, "available_nbytes", lambda: 0)
    ours(x).backward()  # there is room for sums now

"""Every step trains all parameters: it must be the optimizer's step on the plain model, whenever updates happen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.copies.link import Link, open_link
from chunkft_fx.copies.states.ring import CopyingRing
from chunkft_fx.copies.tier import HostTier
from chunkft_fx.errors import NoGradientToScale, OptionError, OutsideGradient, PartialStep, StaleBackward
from chunkft_fx.graph import ops
from chunkft_fx.optim.states import staging
from chunkft_fx.optim.states.pieces import PieceUpdates
from chunkft_fx.plan import pieces
from tests.support.forced_streaming import streaming

UPDATES = ("step", "backward")


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that they cut tensors."""
    monkeypatch.setattr(pieces, "LARGEST_NBYTES", 2000)


class Tied(nn.Module):
    """An embedding whose weight is the head's, between them two layers; one parameter is used in some steps only."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, dtype=dtype)
        self.layers = nn.ModuleList(nn.Linear(6, 6, dtype=dtype) for _ in range(2))
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        self.head = nn.Linear(6, 11, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, scaled: bool = True) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        logits = self.head(x * self.scale if scaled else x)
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


def twins(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    model = Tied(dtype)
    return model, copy.deepcopy(model)


def batch(step: int) -> Tensor:
    return torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(step))


def copying_ring(incoming: Link, depth: int, nbytes: int) -> CopyingRing:
    """The ring of a GPU, beside a CPU."""
    return CopyingRing(open_link(incoming.device), open_link(incoming.device), HostTier(incoming.device), depth, nbytes)


def assert_equal(a: nn.Module, b: nn.Module, tolerance: float = 0.0) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("update", UPDATES)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_ten_steps_are_those_of_the_plain_model(update: str, data: st.DataObject) -> None:
    """Accumulation, groups, frozen and tied weights, parameters that are unused in some steps, rates that change."""
    plain, model = twins(data.draw(st.integers(0, 9)))
    frozen = data.draw(st.sampled_from(["", "layers.0.weight", "embed.weight"]))
    for m in (plain, model):
        for name, p in m.named_parameters():
            p.requires_grad_(name != frozen)
    compiled = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager")
    clip = data.draw(st.sampled_from([None, 0.05])) if update == "step" else None
    ours = chunkft_fx.AdamW(
        compiled, lr=1e-2, weight_decay=0.1, no_decay=("*.bias",), max_grad_norm=clip, update=update
    )
    decayed = [p for n, p in plain.named_parameters() if not n.endswith("bias") and p.requires_grad]
    spared = [p for n, p in plain.named_parameters() if n.endswith("bias")]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
    for step in range(10):
        micro = data.draw(st.integers(1, 3))
        scaled = data.draw(st.booleans())
        lr = data.draw(st.sampled_from([1e-2, 3e-3]))
        for o in (ours, theirs):
            for g in o.param_groups:
                g["lr"] = lr
        for i in range(micro):
            ids = batch(10 * step + i)
            (plain(ids, scaled) / micro).backward()
            if i < micro - 1:
                with compiled.no_sync():
                    (compiled(ids, scaled) / micro).backward()
            else:
                (compiled(ids, scaled) / micro).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        if update == "backward":
            assert all(s.grad is None for s in compiled.active_slices())
        ours.step()
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
    assert_equal(compiled, plain, 1e-9)


@pytest.mark.parametrize("update", UPDATES)
def test_float32_is_equal_to_the_bit(update: str) -> None:
    plain, model = twins(dtype=torch.float32)
    compiled = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager")
    one = chunkft_fx.compile(plain, "1GB", chunks=1, backend="eager")
    ours, theirs = chunkft_fx.AdamW(compiled, lr=1e-2, update=update), chunkft_fx.AdamW(one, lr=1e-2)
    for step in range(10):
        for m, o in ((compiled, ours), (one, theirs)):
            m(batch(step)).backward()
            o.step()
            o.zero_grad()
    assert_equal(compiled, one)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", ["SGD", "Adafactor"])
def test_the_other_optimizers_cover_all_parameters_too(kind: str, update: str) -> None:
    plain, model = twins()
    compiled = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager")
    ours = getattr(chunkft_fx, kind)(compiled, lr=1e-2, update=update)
    theirs = getattr(torch.optim, kind)(plain.parameters(), lr=1e-2)
    for step in range(5):
        for m, o in ((compiled, ours), (plain, theirs)):
            m(batch(step)).backward()
            o.step()
            o.zero_grad()
    assert_equal(compiled, plain, 1e-9)


@pytest.mark.parametrize("update", UPDATES)
def test_bfloat16_weights_stay_the_rounded_masters(update: str) -> None:
    _, model = twins(dtype=torch.bfloat16)
    compiled = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager")
    ours = chunkft_fx.AdamW(compiled, lr=1e-2, update=update)
    for step in range(5):
        compiled(batch(step)).backward()
        ours.step()
        ours.zero_grad()
    for p in compiled.parameters():
        assert torch.equal(ours.state[p]["master"].bfloat16(), p.detach())


@pytest.mark.parametrize("is_copied", [False, True])
@pytest.mark.parametrize("update", UPDATES)
def test_streamed_weights_are_updated_in_host_memory(
    update: str, is_copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = twins()
    if is_copied:
        monkeypatch.setattr(staging, "make_ring", copying_ring)
    with streaming("all"):
        compiled = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager")
        ours = chunkft_fx.AdamW(compiled, lr=1e-2, update=update)
        theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
        for step in range(5):
            for m, o in ((compiled, ours), (plain, theirs)):
                m(batch(step)).backward()
                o.step()
                o.zero_grad()
    assert_equal(compiled, plain, 1e-9)


def test_an_update_stands_behind_the_last_contribution() -> None:
    _, model = twins()
    compiled = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager")
    ours = chunkft_fx.AdamW(compiled, update="backward")
    compiled(batch(0)).backward()
    updates = compiled.program.graph.find_nodes(op="call_function", target=ops.update)
    tied = [n for n in updates if "embed.weight" in n.meta["names"]]
    assert tied
    assert all(n.meta["names"].count("embed.weight") == 2 for n in tied)
    assert len(updates) == len(compiled.plan.policy.pieces)
    ours.step()


def test_the_updates_behind_one_backward_call_are_one_group() -> None:
    """Two groups would have the backward wait for the first before it goes on."""
    _, model = twins()
    compiled = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager")
    ours = chunkft_fx.AdamW(compiled, update="backward")
    compiled(batch(0)).backward()
    ours.step()
    groups: dict[int, set[int]] = {}
    calls = 0
    for node in compiled.program.graph.nodes:
        calls += str(node.target).endswith("_backward")
        if node.target is ops.update:
            groups.setdefault(calls, set()).add(node.meta["group"])
    assert len(groups) > 2
    assert groups == {behind: {behind} for behind in groups}


@pytest.mark.parametrize("at", [0, 3])
def test_a_step_that_fails_halfway_says_so(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = twins()
    compiled = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager")
    ours = chunkft_fx.AdamW(compiled, update="backward")
    compiled(batch(0)).backward()
    ours.step()
    before, saved = copy.deepcopy(compiled.state_dict()), copy.deepcopy(ours.state_dict())
    update, calls = PieceUpdates.update, iter(range(10**6))

    def failing(self: PieceUpdates, *args: Any) -> None:
        if next(calls) == at:
            raise KeyboardInterrupt
        update(self, *args)

    monkeypatch.setattr(PieceUpdates, "update", failing)
    loss = compiled(batch(1))
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    monkeypatch.undo()
    if at == 0:  # nothing was changed yet
        compiled(batch(1)).backward()
        return
    with pytest.raises(PartialStep, match="ahead of the others"):
        compiled(batch(1)).backward()
    with pytest.raises(PartialStep):
        ours.step()
    with pytest.raises(PartialStep):
        ours.state_dict()
    compiled.load_state_dict(before)
    ours.load_state_dict(saved)
    compiled(batch(1)).backward()
    ours.step()


def test_a_forward_outside_of_no_sync_cannot_accumulate() -> None:
    _, model = twins()
    compiled = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager")
    ours = chunkft_fx.AdamW(compiled, update="backward")
    compiled(batch(0)).backward()
    ours.step()
    loss = compiled(batch(0))
    with compiled.no_sync(), pytest.raises(StaleBackward, match="no_sync"):
        loss.backward()


def test_a_gradient_behind_its_update_is_refused() -> None:
    """A weight used beside the call: before the update its gradient counts, behind it there would be two updates."""
    plain, model = twins()
    compiled = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager")
    ours = chunkft_fx.AdamW(compiled, lr=1e-2, update="backward")
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for m, o in ((compiled, ours), (plain, theirs)):
        m.get_parameter("layers.0.weight").square().sum().backward()
        m(batch(0)).backward()
        o.step()
        o.zero_grad()
    assert_equal(compiled, plain, 1e-9)
    compiled(batch(1)).backward()
    before = copy.deepcopy(compiled.state_dict())
    with pytest.raises(OutsideGradient, match=r"layers\.0\.weight"):
        compiled.get_parameter("layers.0.weight").square().sum().backward()
    with compiled.no_sync():
        compiled(batch(1)).backward()
    with pytest.raises(OutsideGradient, match="behind its update"):
        ours.step()
    assert all(torch.equal(v, before[k]) for k, v in compiled.state_dict().items())
    ours.zero_grad()
    ours.step()


def test_two_forwards_cannot_both_update() -> None:
    _, model = twins()
    compiled = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager")
    ours = chunkft_fx.AdamW(compiled, update="backward")
    first, second = compiled(batch(0)), compiled(batch(1))
    first.backward()
    with pytest.raises(StaleBackward):
        second.backward()
    ours.step()


def test_what_cannot_be_is_refused() -> None:
    _, model = twins()
    with pytest.raises(OptionError, match="coverage"):
        chunkft_fx.compile(model, "1GB", coverage="some")
    with pytest.raises(OptionError, match="chunks=4"):
        chunkft_fx.compile(model, "1GB", coverage="all", chunks=4, interval=1)
    one = chunkft_fx.compile(model, "1GB", chunks=1)
    with pytest.raises(OptionError, match='coverage="all"'):
        chunkft_fx.AdamW(one, update="backward")
    compiled = chunkft_fx.compile(twins()[1], "1GB", coverage="all", backend="eager")
    with pytest.raises(OptionError, match="max_grad_norm"):
        chunkft_fx.AdamW(compiled, update="backward", max_grad_norm=1.0)
    with pytest.raises(OptionError, match="reset"):
        chunkft_fx.AdamW(compiled, states="reset")
    with pytest.raises(OptionError, match="update='now'"):
        chunkft_fx.AdamW(compiled, update="now")
    half = chunkft_fx.compile(twins(dtype=torch.float16)[1], "1GB", coverage="all", backend="eager")
    with pytest.raises(OptionError, match="float16"):
        chunkft_fx.AdamW(half, update="backward")
    ours = chunkft_fx.AdamW(compiled, update="backward")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(compiled(batch(0))).backward()
    with pytest.raises(NoGradientToScale, match="backward"):
        scaler.step(ours)

"""Several micro-batches in one step: they must be those one after the other, and fetch each weight once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.copies.weight_ring import Ring
from chunkft_fx.errors import ChunkFTError, OptionError, UnsupportedGraph
from chunkft_fx.graph import ops
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.plan import pieces
from chunkft_fx.plan.policy import DEPTH
from chunkft_fx.predict.region import memory as region_memory
from chunkft_fx.predict.step_memory import step_timeline
from chunkft_fx.runtime.session import Session
from chunkft_fx.tools.zoo import tiny
from tests.runtime.test_full_coverage import assert_equal
from tests.support.equivalence import loss_of
from tests.support.forced_policy import force
from tests.support.forced_streaming import streaming
from tests.support.live_storages import LiveStorages
from tests.support.waiting import waiting_in_host

UPDATES = ("step", "backward")
IGNORED = -100
WORDS = 11


@pytest.fixture(autouse=True)
def _checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that they cut tensors, and programs verified after each pass."""
    monkeypatch.setattr(pieces, "LARGEST_NBYTES", 2000)
    monkeypatch.setenv("CHUNKFT_VERIFY", "1")


class Masked(nn.Module):
    """A tied embedding around layers, and a loss that leaves out ignored labels."""

    def __init__(self, layers: int = 2, width: int = 6, is_tied: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width, dtype=torch.float64)
        self.layers = nn.ModuleList(nn.Linear(width, width, dtype=torch.float64) for _ in range(layers))
        self.norm = nn.LayerNorm(width, dtype=torch.float64)
        self.head = nn.Linear(width, WORDS, bias=False, dtype=torch.float64)
        if is_tied:
            self.head.weight = self.embed.weight
        self.dropout = dropout

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + nn.functional.dropout(torch.tanh(layer(x)), self.dropout, self.training)
        logits = self.head(self.norm(x))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def micro_batch(seed: int) -> dict[str, Tensor]:
    """Three rows of five tokens, of whose labels another number is ignored each time."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, WORDS, (3, 5), generator=generator)
    ignored = torch.rand(3, 5, generator=generator) < torch.rand((), generator=generator)
    ignored[0, 0] = False
    return {"ids": ids, "labels": ids.masked_fill(ignored, IGNORED)}


def weights_of(batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """The share of each micro-batch in the labels that count."""
    counts = torch.stack([(b["labels"] != IGNORED).sum() for b in batches])
    return list(counts / counts.sum())


def vertical(compiled: CompiledModule, batches: list[dict[str, Tensor]]) -> None:
    outputs = compiled.accumulate(batches)
    torch.stack([o["loss"] * w for o, w in zip(outputs, weights_of(batches), strict=True)]).sum().backward()


def in_sequence(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    for b, w in zip(batches, weights_of(batches), strict=True):
        (model(**b)["loss"] * w).backward()


def full(model: nn.Module, **options: Any) -> CompiledModule:
    return chunkft_fx.compile(model, "1GB", coverage="all", backend="eager", **options)


@pytest.mark.parametrize("update", UPDATES)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_ten_steps_are_those_of_the_plain_model(update: str, data: st.DataObject) -> None:
    """Uneven ignored labels, tied and frozen weights, clipping, streamed weights, gradients that wait on the host."""
    torch.manual_seed(data.draw(st.integers(0, 9)))
    plain = Masked(data.draw(st.integers(1, 3)), data.draw(st.sampled_from([4, 6])), data.draw(st.booleans()))
    model = copy.deepcopy(plain)
    frozen = data.draw(st.sampled_from(["", "layers.0.weight", "embed.weight", "norm.bias"]))
    for m in (plain, model):
        m.get_parameter(frozen).requires_grad_(False) if frozen else None
    clip = data.draw(st.sampled_from([None, 0.05])) if update == "step" else None
    with ExitStack() as stack:
        share = data.draw(st.sampled_from([None, "all", "mixed"]))
        if share is not None:
            stack.enter_context(streaming(share))
        if data.draw(st.booleans()):
            stack.enter_context(waiting_in_host(data.draw(st.booleans())))
        compiled = full(model)
        ours = chunkft_fx.AdamW(compiled, lr=1e-2, weight_decay=0.1, max_grad_norm=clip, update=update)
        theirs = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        for step in range(10):
            batches = [micro_batch(10 * step + i) for i in range(data.draw(st.integers(1, 4)))]
            vertical(compiled, batches)
            in_sequence(plain, batches)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
            ours.step()
            theirs.step()
            ours.zero_grad()
            theirs.zero_grad()
    assert_equal(compiled, plain, 1e-9)


@pytest.mark.parametrize("where", ["device", "host", "backward"])
def test_bfloat16_gradients_add_up_in_float32(where: str) -> None:
    """Masters are to the bit those after the micro-batches in sequence: sums are made in the same order."""
    found = []
    for is_vertical in (True, False):
        torch.manual_seed(0)
        with waiting_in_host() if where == "host" else ExitStack():
            compiled = full(Masked(is_tied=False).bfloat16())
            ours = chunkft_fx.AdamW(compiled, lr=1e-2, update="backward" if where == "backward" else "step")
            for step in range(3):
                batches = [micro_batch(10 * step + i) for i in range(4)]
                shares = weights_of(batches)
                if is_vertical:
                    losses = [o["loss"] for o in compiled.accumulate(batches)]
                    torch.stack([loss * w for loss, w in zip(losses, shares, strict=True)]).sum().backward()
                else:
                    for i, (b, w) in enumerate(zip(batches, shares, strict=True)):
                        with compiled.no_sync() if i < 3 else ExitStack():
                            (compiled(**b)["loss"] * w).backward()
                ours.step()
                ours.zero_grad()
        found.append([ours.state[p]["master"] for p in compiled.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_step_on_a_chunk_is_that_of_its_micro_batches_in_sequence() -> None:
    torch.manual_seed(0)
    one = Masked(3)
    compiled, other = (
        chunkft_fx.compile(copy.deepcopy(one), "1GB", chunks=4, interval=1, backend="eager") for _ in range(2)
    )
    ours, theirs = chunkft_fx.AdamW(compiled, lr=1e-2), chunkft_fx.AdamW(other, lr=1e-2)
    for step in range(10):
        batches = [micro_batch(10 * step + i) for i in range(3)]
        vertical(compiled, batches)
        in_sequence(other, batches)
        ours.step()
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
    assert_equal(compiled, other, 1e-9)
    assert compiled.schedule.state_dict() == other.schedule.state_dict()


@pytest.mark.parametrize("update", UPDATES)
def test_steps_and_no_sync_add_up(update: str) -> None:
    """Two vertical steps and a plain call, of which the last updates."""
    torch.manual_seed(0)
    plain = Masked()
    compiled = full(copy.deepcopy(plain))
    ours = chunkft_fx.AdamW(compiled, lr=1e-2, update=update)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for step in range(3):
        first, second = ([micro_batch(10 * step + 4 * k + i) for i in range(3)] for k in range(2))
        with compiled.no_sync():
            vertical(compiled, first)
            compiled(**micro_batch(99))["loss"].backward()
        vertical(compiled, second)
        in_sequence(plain, first)
        plain(**micro_batch(99))["loss"].backward()
        in_sequence(plain, second)
        ours.step()
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
    assert_equal(compiled, plain, 1e-9)


@pytest.mark.parametrize("update", UPDATES)
def test_a_streamed_weight_is_fetched_as_often_as_for_one(update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []
    fetch = Ring.fetch

    def counted(self: Ring, *arguments: Any) -> list[Tensor]:
        fetched.append(1)
        return fetch(self, *arguments)

    monkeypatch.setattr(Ring, "fetch", counted)
    counts = []
    for micro_batches in (1, 2, 5):
        torch.manual_seed(0)
        with streaming("all"):
            compiled = full(Masked())
            optimizer = chunkft_fx.AdamW(compiled, update=update)
            fetched.clear()
            vertical(compiled, [micro_batch(i) for i in range(micro_batches)])
            optimizer.step()
        calls = compiled.program.graph.find_nodes(op="call_module")
        assert len(calls) == micro_batches * 2 * len(compiled.program.variants)
        counts.append((len(fetched), len(compiled.program.graph.find_nodes(op="call_function", target=ops.update))))
    assert len(set(counts)) == 1


def test_an_output_that_no_loss_reads_and_one_that_is_not_the_loss() -> None:
    torch.manual_seed(0)
    plain = Masked()
    compiled = full(copy.deepcopy(plain), return_logits=True)
    batches = [micro_batch(i) for i in range(3)]
    for _ in range(2):  # the second time it is known which outputs count
        for m in (compiled, plain):
            m.zero_grad()
            outputs = compiled.accumulate(batches) if m is compiled else [plain(**b) for b in batches]
            (outputs[0]["loss"] + outputs[2]["logits"].square().sum()).backward()
        gradients = {s.name: s.grad for s in compiled.active_slices()}
        for name, p in plain.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-9, atol=1e-9)


def test_outputs_are_those_of_calls() -> None:
    torch.manual_seed(0)
    compiled = full(Masked(), return_logits=True)
    batches = [micro_batch(i) for i in range(3)]
    alone = [compiled(**b) for b in batches]
    for prepare in (torch.enable_grad, torch.no_grad):
        for mode in (True, False):
            compiled.train(mode)
            with prepare():
                together = compiled.accumulate(batches)
            for a, b in zip(alone, together, strict=True):
                assert a.keys() == b.keys()
                assert all(torch.equal(a[k], b[k]) for k in a)


def test_evaluation_with_gradients() -> None:
    torch.manual_seed(0)
    plain = Masked(dropout=0.5).eval()
    compiled = full(copy.deepcopy(plain))
    ours, theirs = (
        chunkft_fx.AdamW(compiled, lr=1e-2, update="backward"),
        torch.optim.AdamW(plain.parameters(), lr=1e-2),
    )
    batches = [micro_batch(i) for i in range(3)]
    for _ in range(3):
        vertical(compiled, batches)
        in_sequence(plain, batches)
        ours.step()
        theirs.step()
        theirs.zero_grad()
    assert_equal(compiled, plain, 1e-9)


def test_each_micro_batch_has_draws_of_its_own_in_the_order_of_the_regions() -> None:
    """The plain model's layers, run in that order under the same seed, draw the same masks."""
    torch.manual_seed(0)
    plain = Masked(3, dropout=0.5)
    compiled = full(copy.deepcopy(plain))
    batches = [micro_batch(0), micro_batch(0)]
    torch.manual_seed(5)
    losses = torch.stack([o["loss"] for o in compiled.accumulate(batches)])
    losses.sum().backward()
    torch.manual_seed(5)
    xs = [plain.embed(b["ids"]) for b in batches]
    for layer in plain.layers:
        xs = [x + nn.functional.dropout(torch.tanh(layer(x)), 0.5) for x in xs]
    logits = [plain.head(plain.norm(x)).flatten(0, 1) for x in xs]
    expected = torch.stack(
        [nn.functional.cross_entropy(v, b["labels"].flatten()) for v, b in zip(logits, batches, strict=True)]
    )
    expected.sum().backward()
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    for s in compiled.active_slices():
        torch.testing.assert_close(s.grad, plain.get_parameter(s.name).grad, rtol=1e-9, atol=1e-9)


class Normed(nn.Module):
    """Batch norm in each layer; ``late`` has a buffer that the first layer reads and the last one writes."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), nn.BatchNorm1d(4, dtype=torch.float64))
            for _ in range(3)
        )
        self.late = late
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.seen if self.late else x
        for layer in self.layers:
            x = torch.tanh(layer(x))
        self.seen.add_(x.detach().sum())
        return x.square().sum()


def test_written_buffers_go_from_micro_batch_to_micro_batch() -> None:
    torch.manual_seed(0)
    plain = Normed()
    compiled = full(copy.deepcopy(plain))
    ours, theirs = chunkft_fx.AdamW(compiled, lr=1e-2), torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for step in range(5):
        xs = [torch.randn(6, 4, dtype=torch.float64) + step for _ in range(3)]
        torch.stack(compiled.accumulate(xs)).sum().backward()
        for x in xs:
            plain(x).backward()
        ours.step()
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
    for (name, a), b in zip(plain.state_dict().items(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def test_a_buffer_that_is_read_before_the_region_that_writes_it_is_refused() -> None:
    compiled = full(Normed(late=True))
    xs = [torch.ones(6, 4, dtype=torch.float64) for _ in range(2)]
    before = copy.deepcopy(compiled.state_dict())
    with pytest.raises(UnsupportedGraph, match="later region"):
        compiled.accumulate(xs)
    assert all(torch.equal(v, before[k]) for k, v in compiled.state_dict().items())
    compiled(xs[0]).backward()


class Writing(nn.Module):
    """Writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        return self.linear(x).sum()


class Counting(nn.Module):
    """Counts its calls, and does something else each time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x).sum() * self.calls


def rows(count: int = 3, **options: Any) -> Tensor:
    return torch.ones(count, 4, dtype=torch.float64, **options)


@pytest.mark.parametrize(
    ("make", "batches", "error", "told"),
    [
        (Normed, [], OptionError, "given an empty list"),
        (Normed, rows(), OptionError, "a list of micro-batches"),
        (Normed, [rows(), 3], OptionError, "tuple of positional"),
        (Normed, [rows(), rows(4)], OptionError, r"\[4, 4\].*pad the shorter"),
        (Normed, [rows(), rows().float()], OptionError, "float32"),
        (Normed, [rows(), {"x": rows()}], OptionError, "other arguments"),
        (Normed, [rows(), rows(requires_grad=True)], UnsupportedGraph, "different graphs"),
        (Normed, [rows(requires_grad=True), rows(requires_grad=True)], UnsupportedGraph, "detach"),
        (Writing, [rows(), rows()], UnsupportedGraph, "writes into its inputs"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(
    make: Callable[[], nn.Module], batches: Any, error: type[ChunkFTError], told: str
) -> None:
    compiled = full(make())
    before = copy.deepcopy(compiled.state_dict())
    with pytest.raises(error, match=told):
        compiled.accumulate(batches)
    assert all(torch.equal(v, before[k]) for k, v in compiled.state_dict().items())
    loss_of(compiled(rows())).backward()


class Completing(nn.Module):
    """Completes a setting in its first call, as classifiers of transformers do, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)
        self.kind: str | None = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.kind is None:
            self.kind = "regression"
        self.calls += 1
        return self.linear(x).square().sum()


def test_python_state_that_no_value_depends_on_is_as_after_calls() -> None:
    torch.manual_seed(0)
    plain = Completing()
    compiled = full(copy.deepcopy(plain))
    ours, theirs = chunkft_fx.AdamW(compiled, lr=1e-2), torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for _ in range(3):
        torch.stack(compiled.accumulate([rows(), 2 * rows(), 3 * rows()])).sum().backward()
        for factor in (1, 2, 3):
            plain(factor * rows()).backward()
        ours.step()
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
    assert_equal(compiled, plain, 1e-9)
    assert (compiled.kind, compiled.calls) == (plain.kind, plain.calls)


def test_a_forward_that_counts_its_calls_is_refused() -> None:
    compiled = full(Counting())
    with pytest.raises(UnsupportedGraph, match="Python state"):
        compiled.accumulate([rows(), rows()])


def test_hooks_on_the_call_are_refused() -> None:
    compiled = full(Normed())
    handle = compiled.register_forward_hook(lambda *_: None)
    with pytest.raises(OptionError, match="hooks"):
        compiled.accumulate([rows(), rows()])
    handle.remove()
    compiled.accumulate([rows(), rows()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "cnn", "mlp"])
def test_the_predicted_peak_is_that_of_the_tracker(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tracker sees an operator as a whole, so what the head allocates inside is left to its own tests."""
    monkeypatch.setattr(region_memory, "head_workspace", lambda node, sizes: 0)
    model, batch = tiny(family, dtype=dtype)
    compiled = chunkft_fx.compile(model, "8GB", chunks=1, backend="eager")
    batches = [batch(2, 12, i) for i in range(3)]

    def step(tracker: LiveStorages | None = None) -> None:
        with pytest.MonkeyPatch.context() as patched:
            if tracker is not None:
                accumulated = Session.accumulated

                def tracked(self: Session, given: Any) -> Any:
                    with tracker:
                        return accumulated(self, given)

                patched.setattr(Session, "accumulated", tracked)
            outputs = compiled.accumulate(batches)
        losses = [loss_of(o) for o in outputs]
        tangents = [torch.ones_like(loss) for loss in losses]
        with ExitStack() as stack:
            if tracker is not None:
                tracker.watch(tangents)
                stack.enter_context(tracker)
            torch.autograd.backward(losses, tangents)

    step()
    session = compiled._training.sessions[-1]
    regions = len(session.programs.outline.regions)
    for away in (frozenset(), frozenset(n for n, _ in model.named_parameters())):
        compiled.residency.settle(away, DEPTH)
        for save_from, below in ((0, 0), (regions // 2 + 1, 0), (regions, regions)):
            step()
            force(compiled, save_from=save_from, offload_below=below)
            step()
            tracker = LiveStorages()
            step(tracker)
            executable = session.programs.last
            assert executable is not None
            assert executable.program.counts["repeat_calls"] > 0
            predicted = max(m.nbytes for m in step_timeline(executable, "eager"))
            assert predicted == tracker.peak_nbytes, (save_from, below)

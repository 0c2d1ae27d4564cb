"""Calls too large for the budget: the library splits their batch, and trains to the numbers of the whole one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import chunkft_fx
from chunkft_fx.errors import BudgetInfeasible
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.plan import pieces
from chunkft_fx.planning.batch_plan import BatchPlans
from tests.runtime.test_full_coverage import assert_equal
from tests.runtime.test_micro_batches import IGNORED, UPDATES, WORDS, Masked, full
from tests.support.forced_splits import NO_ROOM, split_into, unsplit
from tests.support.forced_streaming import streaming
from tests.support.waiting import waiting_in_host


@pytest.fixture(autouse=True)
def _checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that they cut tensors, and programs verified after each pass."""
    monkeypatch.setattr(pieces, "LARGEST_NBYTES", 2000)
    monkeypatch.setenv("CHUNKFT_VERIFY", "1")


def rows(count: int, seed: int, tokens: int = 5, ignored: Sequence[int] = ()) -> dict[str, Tensor]:
    """Rows of tokens with uneven numbers of ignored labels; all of them in the rows that are named."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, WORDS, (count, tokens), generator=generator)
    is_ignored = torch.rand(count, tokens, generator=generator) < torch.rand(count, 1, generator=generator)
    is_ignored[-1, 0] = False
    is_ignored[list(ignored)] = True
    return {"ids": ids, "labels": ids.masked_fill(is_ignored, IGNORED)}


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    if issubclass(type(model), CompiledModule):  # for isinstance it passes as the model's class
        return chunkft_fx.AdamW(model, lr=1e-2, weight_decay=0.1, **options)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def steps(
    compiled: nn.Module, plain: nn.Module, batches: Sequence[Any], clip: float | None = None, **options: Any
) -> None:
    """Train both on the same batches; their losses have to be equal."""
    ours, theirs = adamw(compiled, max_grad_norm=clip, **options), adamw(plain)
    for batch in batches:
        losses = [m(**batch)["loss"] for m in (compiled, plain)]
        torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
        for loss in losses:
            loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(plain.parameters(), clip)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("update", UPDATES)
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_five_steps_are_those_of_the_whole_batch(update: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 9)))
    plain = Masked(data.draw(st.integers(1, 3)), 6, data.draw(st.booleans()))
    model = copy.deepcopy(plain)
    frozen = data.draw(st.sampled_from(["", "layers.0.weight", "embed.weight"]))
    for m in (plain, model):
        m.get_parameter(frozen).requires_grad_(False) if frozen else None
    size, parts = data.draw(st.sampled_from([(2, 2), (4, 2), (4, 4), (6, 3), (5, 5)]))
    ignored = data.draw(st.sampled_from([(), (0,), (0, 1)])) if size > 2 else ()
    clip = data.draw(st.sampled_from([None, 0.05])) if update == "step" else None
    with ExitStack() as stack:
        share = data.draw(st.sampled_from([None, "all"]))
        if share is not None:
            stack.enter_context(streaming(share))
        if data.draw(st.booleans()):
            stack.enter_context(waiting_in_host(data.draw(st.booleans())))
        compiled = full(model, return_logits=data.draw(st.booleans()))
        stack.enter_context(split_into(parts))
        steps(compiled, plain, [rows(size, step, ignored=ignored) for step in range(5)], clip, update=update)
        assert compiled.plan.policy.micro_batches == parts
    assert_equal(compiled, plain, 1e-9)


@pytest.mark.parametrize("update", UPDATES)
def test_a_budget_that_the_whole_batch_does_not_fit(update: str) -> None:
    """No part of this is forced: the planner finds the fewest parts that fit."""
    torch.manual_seed(0)
    plain = Masked(3, 16)
    batches = [rows(12, step, 64) for step in range(5)]
    needed = _smallest_budget(copy.deepcopy(plain), batches[0], update)
    compiled = chunkft_fx.compile(copy.deepcopy(plain), needed - 1, coverage="all", backend="eager")
    steps(compiled, plain, batches, update=update)
    assert_equal(compiled, plain, 1e-9)
    assert compiled.plan.policy.micro_batches == 2
    assert (compiled.plan.predicted_peak_bytes or 0) <= needed - 1
    assert "a batch that is split into 2 micro-batches, each with inputs of shapes [[6, 64]" in " ".join(
        str(compiled.plan).split()
    )
    assert "split into 2 micro-batches" in " ".join(compiled.plan.explain().split())


def _smallest_budget(model: nn.Module, batch: dict[str, Tensor], update: str = "step") -> int:
    """Bytes that the whole batch needs at least."""
    with unsplit():
        compiled = chunkft_fx.compile(model, 1000, coverage="all", backend="eager")
        optimizer = chunkft_fx.AdamW(compiled, update=update)
        with pytest.raises(BudgetInfeasible, match="because it holds one sample") as told:
            compiled(**batch)
    assert optimizer.state is not None
    return told.value.smallest_budget_bytes


def test_a_budget_that_no_part_fits_says_what_the_smallest_needs() -> None:
    torch.manual_seed(0)
    batch = rows(12, 0, 64)
    whole = _smallest_budget(Masked(3, 16), batch)
    compiled = chunkft_fx.compile(Masked(3, 16), 1000, coverage="all", backend="eager")
    with pytest.raises(BudgetInfeasible, match=r"of one sample do not fit either; with a budget of \d+ bytes") as told:
        compiled(**batch)
    assert told.value.smallest_budget_bytes < whole
    fits = chunkft_fx.compile(Masked(3, 16), told.value.smallest_budget_bytes, coverage="all", backend="eager")
    fits(**batch)["loss"].backward()
    assert fits.plan.policy.micro_batches > 2


def test_all_labels_ignored_is_as_in_torch() -> None:
    plain = Masked()
    compiled = full(copy.deepcopy(plain))
    batch = rows(4, 0, ignored=(0, 1, 2, 3))
    with split_into(2):
        for m in (compiled, plain):
            loss = m(**batch)["loss"]
            assert loss.isnan()
            loss.backward()
    for s in compiled.active_slices():
        torch.testing.assert_close(s.grad, plain.get_parameter(s.name).grad, rtol=0, atol=0)


@pytest.mark.parametrize("update", UPDATES)
def test_losses_are_scaled_and_accumulated_as_those_of_other_calls(update: str) -> None:
    plain = Masked()
    compiled = full(copy.deepcopy(plain))
    ours, theirs = adamw(compiled, update=update), adamw(plain)
    with split_into(2):
        for step in range(3):
            for i in range(2):
                batch = rows(4, 10 * step + i)
                with compiled.no_sync() if i == 0 else ExitStack():
                    (compiled(**batch)["loss"] / 2).backward()
                (plain(**batch)["loss"] / 2).backward()
            for optimizer in (ours, theirs):
                optimizer.step()
                optimizer.zero_grad()
    assert_equal(compiled, plain, 1e-9)


def test_with_a_gradient_scaler() -> None:
    plain = Masked().float()
    compiled = full(copy.deepcopy(plain))
    for model in (compiled, plain):
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), adamw(model)
        with split_into(2) if model is compiled else ExitStack():
            for step in range(3):
                scaler.scale(model(**rows(4, step))["loss"]).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    assert_equal(compiled, plain, 1e-5)


def test_a_loss_of_outputs_that_are_joined() -> None:
    plain = Masked()
    compiled = full(copy.deepcopy(plain), return_logits=True)
    batch = rows(4, 0)
    with split_into(4):
        for _ in range(2):  # the second time it is known which outputs count
            for m in (compiled, plain):
                m.zero_grad()
                outputs = m(**batch)
                (outputs["loss"] + outputs["logits"].square().mean()).backward()
            for s in compiled.active_slices():
                torch.testing.assert_close(s.grad, plain.get_parameter(s.name).grad, rtol=1e-9, atol=1e-9)


class Attending(nn.Module):
    """Attention with positions and a mask, each given for each sample, for all at once, or for all of a size of one."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = (nn.Embedding(n, 8, dtype=torch.float64) for n in (WORDS, 16))
        self.attention = nn.Linear(8, 24, dtype=torch.float64)
        self.calls: list[int] = []

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.calls.append(ids.shape[0])
        x = self.tokens(ids) + self.places(positions)
        q, k, v = self.attention(x).view(*x.shape[:2], 2, 12).transpose(1, 2).chunk(3, -1)
        x = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        logits = x @ self.tokens.weight.t()
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "mask": mask}


@pytest.mark.parametrize("positions", [(5,), (1, 5), (4, 5)])
@pytest.mark.parametrize("mask", [(5, 5), (1, 1, 5, 5), (4, 1, 5, 5)])
def test_arguments_with_and_without_samples(positions: tuple[int, ...], mask: tuple[int, ...]) -> None:
    """Labels are the ids themselves: one tensor that is given twice; the mask comes back as the very one."""
    torch.manual_seed(0)
    plain = Attending()
    compiled = full(copy.deepcopy(plain))
    ids = torch.randint(0, WORDS, (4, 5))
    batch = {
        "ids": ids,
        "labels": ids,
        "positions": torch.randint(0, 16, positions),
        "mask": torch.rand(mask) < 0.7,
    }
    batch["mask"][..., 0] = True
    with split_into(2):
        steps(compiled, plain, [batch] * 3)
        assert compiled(**batch)["mask"] is batch["mask"]
    assert_equal(compiled, plain, 1e-9)
    assert compiled.calls == [4] * 4


def test_hooks_see_the_call_of_the_whole_batch_once() -> None:
    compiled = full(Masked(), return_logits=True)
    seen: list[tuple[int, int]] = []
    compiled.register_forward_hook(
        lambda m, args, kwargs, out: seen.append((len(kwargs["ids"]), len(out["logits"]))), with_kwargs=True
    )
    with split_into(2):
        compiled(**rows(4, 0))
    assert seen == [(4, 4)]


def test_what_was_found_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch like one before is not planned whole again; others are, and fit whole where they do."""
    asked: list[int] = []
    prepare = BatchPlans.prepare

    def prepared(self: BatchPlans, batches: Any, expected: Any) -> Any:
        asked.append(len(batches))
        if sum(len(b[self._batch[0]]) for b in batches) > 2 and len(batches) == 1:
            raise BudgetInfeasible(NO_ROOM, 1, {})
        return prepare(self, batches, expected)

    monkeypatch.setattr(BatchPlans, "prepare", prepared)
    plain = Masked()
    compiled = full(copy.deepcopy(plain))
    steps(compiled, plain, [rows(4, 0)])
    assert asked[0] == 1 and set(asked[1:]) == {2}
    asked.clear()
    steps(compiled, plain, [rows(4, 1)])
    assert set(asked) == {2}
    asked.clear()
    steps(compiled, plain, [rows(2, 2), rows(4, 3), rows(6, 4, 7), rows(4, 5)])
    assert asked.count(1) > 1
    assert_equal(compiled, plain, 1e-9)


def test_what_was_found_and_fits_no_more() -> None:
    """Then the whole batch is looked at again, and more parts."""
    plain = Masked()
    compiled = full(copy.deepcopy(plain))
    for parts in (2, 4, 4, 2):
        with split_into(parts):
            steps(compiled, plain, [rows(4, parts)])
            assert compiled.program.graph.find_nodes(op="call_module")
    with split_into(8), pytest.raises(BudgetInfeasible, match=f"^{NO_ROOM}; 4 micro-batches of one sample do not fit"):
        compiled(**rows(4, 0))
    steps(compiled, plain, [rows(4, 5)])
    assert_equal(compiled, plain, 1e-9)


def test_lengths_that_vary() -> None:
    plain = Masked()
    compiled = full(copy.deepcopy(plain))
    with split_into(2):
        steps(compiled, plain, [rows(4, step, tokens) for step, tokens in enumerate((5, 7, 6, 12, 5, 9))])
    assert_equal(compiled, plain, 1e-9)


def test_a_chunk_a_step() -> None:
    one = Masked(3)
    compiled, other = (
        chunkft_fx.compile(copy.deepcopy(one), "1GB", chunks=4, interval=1, backend="eager") for _ in range(2)
    )
    ours, theirs = chunkft_fx.AdamW(compiled, lr=1e-2), chunkft_fx.AdamW(other, lr=1e-2)
    for step in range(6):
        batch = rows(4, step)
        with split_into(2):
            compiled(**batch)["loss"].backward()
        other(**batch)["loss"].backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(compiled, other, 1e-9)


def test_a_plan_for_an_example() -> None:
    compiled = full(Masked(), batch=rows(4, 0, 8))
    with split_into(2):
        compiled(**rows(2, 0))
    assert "split into 2 micro-batches, each with inputs of shapes [[2, 8]" in " ".join(str(compiled.plan).split())


def test_evaluation_is_not_split() -> None:
    plain = Masked()
    compiled = full(copy.deepcopy(plain))
    batch = rows(4, 0)
    with split_into(2):
        with torch.no_grad():
            torch.testing.assert_close(compiled(**batch)["loss"], plain(**batch)["loss"])
        assert not compiled._training._part_calls
        with pytest.raises(BudgetInfeasible, match=f"^{NO_ROOM}$"):
            compiled.eval()(**batch)["loss"].backward()


def test_an_evaluation_that_trains_is_not_split() -> None:
    """Once a backward came in evaluation mode, its forwards are planned as those of steps."""
    compiled = full(Masked()).eval()
    batch = rows(4, 0)
    compiled(**batch)["loss"].backward()
    with split_into(2), pytest.raises(BudgetInfeasible, match=f"^{NO_ROOM}$"):
        compiled(**batch)


def test_each_part_draws_its_own_masks() -> None:
    """As the layers of the plain model do, run over one part after the other under the same seed."""
    torch.manual_seed(0)
    plain = Masked(3, dropout=0.5)
    compiled = full(copy.deepcopy(plain))
    ids = torch.randint(0, WORDS, (1, 5)).expand(4, 5).contiguous()
    torch.manual_seed(5)
    with split_into(2):
        loss = compiled(ids=ids, labels=ids)["loss"]
    loss.backward()
    torch.manual_seed(5)
    xs = [plain.embed(part) for part in ids.chunk(2)]
    for layer in plain.layers:
        xs = [x + functional.dropout(torch.tanh(layer(x)), 0.5) for x in xs]
    logits = plain.head(plain.norm(torch.cat(xs)))
    assert not torch.equal(logits[:2], logits[2:])
    expected = functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    for s in compiled.active_slices():
        torch.testing.assert_close(s.grad, plain.get_parameter(s.name).grad, rtol=1e-9, atol=1e-9)


class Doubling(torch.autograd.Function):
    """A function whose gradient is not its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / gradient.norm()


class Odd(nn.Module):
    """A model that must not be split, for a reason of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(4, 4, dtype=torch.float64), kind
        self.norm = nn.BatchNorm1d(4, dtype=torch.float64)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.table = torch.arange(8.0, dtype=torch.float64)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "written":
            x.mul_(2.0)
        y = self.linear(x)
        if self.kind == "function":
            y = Doubling.apply(y)  # type: ignore[no-untyped-call]
        if self.kind == "hook":
            y.register_hook(lambda gradient: gradient / gradient.norm())
        if self.kind == "norm":
            y = self.norm(y)
        if self.kind == "buffer":
            self.seen.add_(y.detach().sum())
        if self.kind == "frequency":
            y = y + functional.embedding(
                torch.zeros(len(x), dtype=torch.long), self.linear.weight, scale_grad_by_freq=True
            )
        if self.kind == "table":
            y = y * self.table[: x.shape[0]]
        return y.square().mean()


ODD = {
    "function": r"autograd_function_apply \(.*test_splits.py.*Doubling.apply",
    "hook": r"(register_hook|autograd_function_apply) \(.*test_splits.py",  # the second in traces of torch 2.11
    "norm": "writes a buffer or an input",
    "buffer": r"writes a buffer or an input \(.*self.seen.add_",
    "written": r"writes a buffer or an input \(.*x.mul_",
    "frequency": "how often the whole batch",
    "table": "depends on the size of the batch",
}


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ODD)
def test_what_must_not_be_split(kind: str) -> None:
    compiled = full(Odd(kind))
    x = torch.randn(4, 4, dtype=torch.float64)
    before = copy.deepcopy(compiled.state_dict()), x.clone()
    with split_into(2), pytest.raises(BudgetInfeasible, match=f"it is not split into micro-batches.*{ODD[kind]}"):
        compiled(x)
    assert torch.equal(x, before[1])
    assert all(torch.equal(v, before[0][k]) for k, v in compiled.state_dict().items())
    compiled(x).backward()


def test_an_input_with_a_gradient_and_a_single_sample() -> None:
    compiled = full(Odd(""))
    x = torch.randn(4, 4, dtype=torch.float64)
    with split_into(2):
        with pytest.raises(BudgetInfeasible, match="an input requires a gradient"):
            compiled(x.requires_grad_())
        with pytest.raises(BudgetInfeasible, match="one sample"):
            compiled(x.detach()[:1])
        compiled(x.detach()).backward()


class Counting(nn.Module):
    """Counts its calls, and does something else each time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x).square().mean() * self.calls


def test_a_model_that_counts_its_calls() -> None:
    """Parts do not count: the call is one."""
    plain = Counting()
    compiled = full(copy.deepcopy(plain))
    x = torch.randn(4, 4, dtype=torch.float64)
    with split_into(2):
        for _ in range(3):
            ours, theirs = compiled(x), plain(x)
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
            ours.backward()
            theirs.backward()
    assert compiled.calls == plain.calls == 3
    torch.testing.assert_close(
        compiled.get_parameter("linear.weight").grad, plain.linear.weight.grad, rtol=1e-9, atol=1e-9
    )

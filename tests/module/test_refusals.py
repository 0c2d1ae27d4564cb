"""What training cannot do right is refused by name, and nothing has changed after the refusal."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

import chunkft_fx
from chunkft_fx import errors
from chunkft_fx.optim import optimizer as steps
from tests.support.tiny_lm import lm_batch, lm_compiled, tiny_lm


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(p, before[n]) for n, p in module.named_parameters())


OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda c: torch.optim.AdamW(c.parameters()),
    lambda c: torch.optim.SGD(c._model.parameters(), lr=1.0),
    lambda c: torch.optim.Adam([c.head.weight]),
    lambda c: torch.optim.RMSprop([{"params": [c.layers[0][1].bias]}, {"params": [nn.Parameter(torch.ones(2))]}]),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_another_optimizer_over_trained_parameters_is_refused(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    compiled = lm_compiled()
    other = make(compiled)
    compiled(**lm_batch()).backward()
    before = weights(compiled)
    with pytest.raises(errors.OptimizerConflict, match=r"use chunkft_fx\.AdamW"):
        other.step()
    assert unchanged(compiled, before)


def test_other_optimizers_go_on_over_other_parameters_and_after_the_module_is_gone() -> None:
    model = tiny_lm()
    model.embed.requires_grad_(False)
    compiled = lm_compiled(model)
    free = nn.Parameter(torch.ones(3))
    other = torch.optim.SGD([free, model.embed.weight], lr=1.0)  # frozen: no module trains it
    free.grad = torch.ones(3)
    other.step()
    assert float(free.detach().sum()) == 0
    del compiled
    plain = torch.optim.SGD(model.parameters(), lr=1.0)
    before = weights(model)
    model(**lm_batch()).backward()
    plain.step()
    assert not unchanged(model, before)


def test_the_latest_optimizer_is_the_modules() -> None:
    compiled = lm_compiled()
    first = chunkft_fx.AdamW(compiled, lr=1e-2)
    compiled(**lm_batch()).backward()
    first.step()
    first.zero_grad()
    second = chunkft_fx.AdamW(compiled, lr=1e-2)
    compiled(**lm_batch()).backward()
    before = weights(compiled)
    with pytest.raises(errors.OptimizerConflict, match="one optimizer"):
        first.step()
    assert unchanged(compiled, before)
    second.step()
    assert not unchanged(compiled, before)


def test_an_optimizer_made_again_in_the_place_of_the_first_steps() -> None:
    compiled = lm_compiled()
    for _ in range(3):
        optimizer = chunkft_fx.AdamW(compiled, lr=1e-2)
        before = weights(compiled)
        compiled(**lm_batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not unchanged(compiled, before)


@pytest.mark.parametrize("part", [lambda m: m, lambda m: m.layers, lambda m: nn.Sequential(m.head, nn.Linear(13, 2))])
def test_parameters_are_trained_by_one_module_at_a_time(part: Callable[[Any], nn.Module]) -> None:
    model = tiny_lm()
    compiled = lm_compiled(model)
    compiled(**lm_batch()).backward()
    with pytest.raises(errors.AlreadyCompiled, match="use that module"):
        chunkft_fx.compile(part(model), "1GB")
    compiled(**lm_batch()).backward()  # goes on
    del compiled
    chunkft_fx.compile(part(model), "1GB")


def test_a_model_is_compiled_again_as_long_as_nothing_was_trained() -> None:
    """As after `BudgetInfeasible`, whose traceback keeps the first module alive; that one then says what it is."""
    model = tiny_lm()
    first = lm_compiled(model)
    optimizer = chunkft_fx.AdamW(first, lr=1e-2)
    with torch.no_grad():
        first(**lm_batch())
    second = lm_compiled(model)
    for act in (functools.partial(first, **lm_batch()), optimizer.step, optimizer.state_dict):
        with pytest.raises(errors.AlreadyCompiled, match="called again"):
            act()
    before = weights(model)
    again = chunkft_fx.AdamW(second, lr=1e-2)
    second(**lm_batch()).backward()
    again.step()
    assert not unchanged(model, before)
    del first, optimizer, act
    (second(**lm_batch()) + second.embed.weight.sum()).backward()  # what the first left behind disturbs nothing
    again.step()


def through_plain(c: Any) -> Tensor:
    loss: Tensor = c._model(**lm_batch())
    return loss


def through_parts(c: Any) -> Tensor:
    """As a fused head of somebody's trainer does: past the compiled call."""
    x = c.embed(lm_batch()["ids"])
    for layer in c.layers:
        x = x + torch.tanh(layer(x))
    loss: Tensor = torch.nn.functional.cross_entropy(
        (x @ c.head.weight.t()).flatten(0, 1), lm_batch()["labels"].flatten()
    )
    return loss


def through_functional(c: Any) -> Tensor:
    loss: Tensor = torch.func.functional_call(c._model, dict(c.named_parameters()), (), lm_batch())
    return loss


@pytest.mark.parametrize("loss_of", [through_plain, through_parts, through_functional])
@pytest.mark.parametrize("chunks", [1, 2])
def test_a_step_whose_gradients_all_came_past_the_call_is_refused(
    loss_of: Callable[[Any], Tensor], chunks: int
) -> None:
    compiled = lm_compiled(chunks=chunks)
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2)
    loss_of(compiled).backward()
    before, position = weights(compiled), compiled.schedule.state_dict()
    with pytest.raises(errors.OutsideGradient, match=r"call the module that chunkft_fx\.compile returned"):
        optimizer.step()
    assert unchanged(compiled, before)
    assert compiled.schedule.state_dict() == position
    optimizer.zero_grad()
    compiled(**lm_batch()).backward()
    optimizer.step()
    assert not unchanged(compiled, before)


def penalty(c: Any) -> None:
    embeds = c.embed(lm_batch()["ids"]).detach().requires_grad_()
    loss = c(embeds=embeds, labels=lm_batch()["labels"])
    (gradient,) = torch.autograd.grad(loss, embeds, create_graph=True)
    (loss + gradient.square().sum()).backward()


def hessian(c: Any) -> None:
    torch.autograd.grad(c(**lm_batch()), [s.parameter for s in c.active_slices()], create_graph=True)


@pytest.mark.parametrize("ask", [penalty, hessian, lambda c: c(**lm_batch()).backward(create_graph=True)])
def test_a_gradient_of_a_gradient_is_refused(ask: Callable[[Any], None]) -> None:
    compiled = lm_compiled()
    with pytest.raises(errors.DoubleBackward, match=r"double backward.*create_graph=True"):
        ask(compiled)
    assert all(p.grad is None for p in compiled.parameters())
    compiled(**lm_batch()).backward()


BAD_OPTIONS: list[tuple[str, Any]] = [
    ("betas", (0.9,)), ("betas", (0.9, 1.0)), ("lr", float("nan")), ("lr", -1.0), ("lr", "fast"), ("eps", -1e-8),
    ("weight_decay", float("inf")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS)
def test_a_step_with_a_bad_option_in_any_group_changes_nothing(name: str, value: Any) -> None:
    compiled = lm_compiled(chunks=1)
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2, no_decay=("*.bias",))
    compiled(**lm_batch()).backward()
    before, norms = weights(compiled), [float(s.grad.norm()) for s in compiled.active_slices()]
    good = optimizer.param_groups[1][name]
    optimizer.param_groups[1][name] = value
    with pytest.raises(errors.OptionError, match=f"{name}="):
        optimizer.step()
    assert unchanged(compiled, before)
    assert [float(s.grad.norm()) for s in compiled.active_slices()] == norms
    assert compiled.schedule.state_dict()["sweep"] == 0
    optimizer.param_groups[1][name] = good
    optimizer.step()
    assert not unchanged(compiled, before)


def test_a_step_that_finds_no_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = lm_compiled(chunks=1)
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2, max_grad_norm=1.0)
    compiled(**lm_batch()).backward()
    before = weights(compiled)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for where, place in (
        (optimizer._states, "announce"),
        (optimizer._states, "staged"),
        (steps, "clip_factor"),
        (optimizer, "prepare"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, place, full)
            with pytest.raises(torch.OutOfMemoryError):
                optimizer.step()
        assert unchanged(compiled, before)
    optimizer.step()
    assert not unchanged(compiled, before)


class TwoHeads(nn.Module):
    """One of two heads, or experts, has a part in a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 70)
        self.heads = nn.ModuleList(nn.Linear(70, 70) for _ in range(2))

    def forward(self, x: Tensor, head: int) -> Tensor:
        result: Tensor = self.heads[head](torch.tanh(self.body(x))).square().mean()
        return result


@pytest.mark.parametrize("how", ["unused", "frozen", "detached"])
def test_chunks_without_gradient_count_their_steps_with_one_warning(how: str) -> None:
    model = TwoHeads()
    compiled = lm_compiled(model, chunks=5)
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2)
    x = torch.randn(3, 4)
    visited: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(15):
            if how == "frozen" and step == 5:
                model.heads[1].requires_grad_(False)
            visited.append(compiled.chunk)
            loss = compiled(x, 0)
            (loss.detach().requires_grad_() if how == "detached" and step in (3, 4) else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
    ours = [str(w.message) for w in caught if issubclass(w.category, errors.ChunkFTWarning)]
    if how == "detached":  # no backward of the module ran: nothing to count
        assert visited[:7] == [0, 1, 2, 3, 3, 3, 4]
        return
    named = [m for m in ours if "heads.1" in m and "no gradient reached" in m]
    assert named and len(named) == len(set(named))
    assert set(visited) == set(range(5)) if how == "unused" else set(visited[:5]) == set(range(5))


def test_a_gradient_scaler_is_told_of_a_chunk_without_gradient_and_the_sweep_moves_on_without_it() -> None:
    compiled = lm_compiled(TwoHeads(), chunks=5)
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2)
    scaler, x, visited = torch.amp.GradScaler("cpu", init_scale=4.0), torch.randn(3, 4), []
    for _ in range(10):
        visited.append(compiled.chunk)
        scaler.scale(compiled(x, 0)).backward()
        if any(s.grad is not None for s in compiled.active_slices()):
            scaler.step(optimizer)
            scaler.update()
        else:
            with pytest.raises(errors.NoGradientToScale, match=r"heads\.1.*optimizer\.step\(\)"):
                scaler.step(optimizer)
            with pytest.warns(errors.ChunkFTWarning) if len(visited) <= 5 else contextlib.nullcontext():
                optimizer.step()
        optimizer.zero_grad()
    assert visited == [*range(5)] * 2


class Turning(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out((x.to(torch.complex64) @ self.turn).abs()).square().mean()
        return result


def test_complex_parameters_are_refused_unless_frozen() -> None:
    with pytest.raises(errors.UnsupportedParameter, match=r"'turn'.*complex64"):
        chunkft_fx.compile(Turning(), "1GB")
    model = Turning()
    model.turn.requires_grad_(False)
    plain = copy.deepcopy(model)
    x = torch.randn(3, 4)
    plain(x).backward()
    compiled = lm_compiled(model, chunks=1)
    compiled(x).backward()
    for s in compiled.active_slices():
        torch.testing.assert_close(s.grad, plain.get_parameter(s.name).grad)


@pytest.fixture
def one_rank(tmp_path: Any) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_wrappers_that_spread_a_model_over_ranks_are_refused() -> None:
    compiled = lm_compiled()
    compiled(**lm_batch()).backward()  # one rank by itself is as none
    compiled.zero_grad()
    with pytest.raises(errors.DistributedNotSupported, match="DistributedDataParallel"):
        nn.parallel.DistributedDataParallel(compiled)(**lm_batch())
    sharded: Any = fully_shard(tiny_lm(), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(errors.DistributedNotSupported, match="FSDP"):
        chunkft_fx.compile(sharded, "1GB")


def _rank(rank: int, store: str) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    compiled = lm_compiled()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    with pytest.raises(errors.DistributedNotSupported, match="2 ranks, and this model was compiled for 1"):
        compiled(**lm_batch())
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_that_come_behind_compile_are_refused(tmp_path: Any) -> None:
    spawn(_rank, (str(tmp_path / "store"),), nprocs=2)

"""A compiled module keeps up with what is done to its model, or says what it cannot follow."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx import errors
from tests.support.tiny_lm import WIDTH, lm_batch, lm_compiled, tiny_lm


def step(compiled: Any, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    compiled(**lm_batch(seed)).backward()
    optimizer.step()
    optimizer.zero_grad()


def changed(compiled: Any, optimizer: torch.optim.Optimizer, steps: int) -> set[str]:
    """The names of the parameters that so many steps change."""
    before = {n: p.detach().clone() for n, p in compiled.named_parameters()}
    for k in range(steps):
        step(compiled, optimizer, k)
    return {n for n, p in compiled.named_parameters() if n not in before or not torch.equal(p, before[n])}


@pytest.mark.parametrize("change", [lambda c: c.double(), lambda c: setattr(c, "head", nn.Linear(WIDTH, 64))])
def test_a_change_that_drops_gradients_says_so(change: Callable[[Any], None]) -> None:
    compiled = lm_compiled(tiny_lm(), 1)
    compiled(**lm_batch()).backward()

    def change_and_call() -> None:
        change(compiled)
        compiled(**lm_batch())

    with pytest.warns(errors.ChunkFTWarning, match="are dropped"):
        change_and_call()
    assert all(s.grad is None for s in compiled.active_slices())


@pytest.mark.parametrize("when", ["before the first call", "between sweeps", "within a sweep"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_what_is_unfrozen_is_trained_from_the_next_sweep_on(when: str, chunks: int) -> None:
    model = tiny_lm()
    model.layers[0].requires_grad_(False)
    compiled = lm_compiled(model, chunks)
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2)
    for k in range({"before the first call": 0, "between sweeps": chunks, "within a sweep": 1}[when]):
        step(compiled, optimizer, k)
    model.layers[0].requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.ChunkFTWarning)
        found = changed(compiled, optimizer, 3 * chunks)
    assert found == set(dict(model.named_parameters()))
    names = {n for chunk in compiled.plan.chunks for s in chunk.slices for n in [s.name]}
    assert names == set(dict(model.named_parameters()))


def test_unfreezing_within_a_sweep_says_when_it_counts() -> None:
    model = tiny_lm()
    model.head.requires_grad_(False)
    compiled = lm_compiled(model, 3)
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2)
    step(compiled, optimizer)
    model.head.requires_grad_(True)
    with pytest.warns(errors.ChunkFTWarning, match=r"head\.weight was unfrozen.*next sweep"):
        step(compiled, optimizer)


def test_what_is_frozen_stays_and_leaves_the_chunks_at_the_next_sweep() -> None:
    compiled = lm_compiled(chunks=2)
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2)
    for k in range(2):
        step(compiled, optimizer, k)
    compiled.embed.requires_grad_(False)
    found = changed(compiled, optimizer, 4)
    assert found == set(dict(compiled.named_parameters())) - {"embed.weight"}
    assert all(s.name != "embed.weight" for chunk in compiled.plan.chunks for s in chunk.slices)
    compiled.embed.requires_grad_(True)
    assert "embed.weight" in changed(compiled, optimizer, 4)
    counts = [run.step for run in optimizer.state[compiled.embed.weight]["slice_steps"]]
    assert counts == [3], "states of a parameter that was frozen for a while go on"


def assigned(c: Any) -> None:
    c.load_state_dict({k: v.clone() for k, v in c.state_dict().items()}, assign=True)


def replaced(c: Any) -> None:
    c.layers[1][1].weight = nn.Parameter(c.layers[1][1].weight.detach() * 1.5)


def replaced_module(c: Any) -> None:
    new = nn.Linear(WIDTH, WIDTH)
    new.load_state_dict(c.layers[1][1].state_dict())
    c.layers[1][1] = new


@pytest.mark.parametrize("change", [assigned, replaced, replaced_module])
def test_parameters_that_take_the_place_of_others_are_trained_with_their_states(change: Callable[[Any], None]) -> None:
    """A run in which objects are replaced equals one in which their values are written."""
    runs = []
    for is_replaced in (True, False):
        compiled = lm_compiled(chunks=2)
        optimizer = chunkft_fx.AdamW(compiled, lr=1e-2)
        for k in range(3):
            step(compiled, optimizer, k)
        if is_replaced:
            change(compiled)
        else:
            plain = copy.deepcopy(compiled._model)
            change(plain)
            compiled.load_state_dict(plain.state_dict())
        for k in range(3, 8):
            step(compiled, optimizer, k)
        runs.append(compiled.state_dict())
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def test_replaced_parameters_are_found_by_the_step_too() -> None:
    compiled = lm_compiled(chunks=1)
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2)
    step(compiled, optimizer)
    compiled(**lm_batch()).backward()
    assigned(compiled)  # the gradients were those of parameters that are gone
    with pytest.warns(errors.ChunkFTWarning, match="no gradient reached"):
        optimizer.step()
    assert changed(compiled, optimizer, 1) == set(dict(compiled.named_parameters()))


def resized(c: Any) -> None:
    c.embed = nn.Embedding(20, WIDTH)
    c.head = nn.Linear(WIDTH, 20, bias=False)


def grown(c: Any) -> None:
    c.layers.append(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)))


def shrunk(c: Any) -> None:
    del c.layers[1]


def tied(c: Any) -> None:
    c.head.weight = c.embed.weight


def cast(c: Any) -> None:
    c._model.double()


@pytest.mark.parametrize("change", [resized, grown, shrunk, tied, cast])
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_before_the_first_step_any_change_is_followed(change: Callable[[Any], None], with_optimizer: bool) -> None:
    compiled = lm_compiled(chunks=2)
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2) if with_optimizer else None
    compiled(**lm_batch()).backward()
    change(compiled)
    plain = copy.deepcopy(compiled._model)
    with pytest.warns(errors.ChunkFTWarning, match="are dropped"):
        compiled._training.check()
    optimizer = optimizer or chunkft_fx.AdamW(compiled, lr=1e-2)
    optimizer.zero_grad()
    assert changed(compiled, optimizer, 2) == set(dict(compiled.named_parameters()))
    reference = lm_compiled(plain, 2)
    second = chunkft_fx.AdamW(reference, lr=1e-2)
    for k in range(2):
        step(reference, second, k)
    assert all(map(torch.equal, compiled.state_dict().values(), reference.state_dict().values()))


def test_a_list_that_was_grown_and_shrunk_between_two_calls_is_still_watched() -> None:
    """``del`` gives a module list another dictionary, which holds what the one before held at the latest call."""
    compiled = lm_compiled(chunks=2)
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2)
    grown(compiled)
    del compiled.layers[-1]
    step(compiled, optimizer)
    grown(compiled)
    with pytest.raises(errors.ModelChanged, match=r"layers\.2.*was added"):
        compiled(**lm_batch())


@pytest.mark.parametrize("change", [resized, grown, shrunk, tied, cast])
def test_after_the_first_step_another_model_is_refused_by_name(change: Callable[[Any], None]) -> None:
    compiled = lm_compiled(chunks=2)
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2)
    step(compiled, optimizer)
    position = compiled.schedule.state_dict()
    change(compiled)
    for act in (lambda: compiled(**lm_batch()), optimizer.step, optimizer.state_dict):
        with pytest.raises(errors.ModelChanged, match=r"(has another|was added|was removed).*new optimizer"):
            act()
    assert compiled.schedule.state_dict() == position


def test_moves_that_a_plan_does_not_allow_are_refused_before_a_tensor_moves() -> None:
    compiled = lm_compiled(chunks=2)
    assert compiled.half().embed.weight.dtype == torch.float16
    assert compiled.float() is compiled
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2)
    step(compiled, optimizer)
    moves: list[Callable[[], Any]] = [compiled.half, compiled.double, lambda: compiled.to(torch.bfloat16)]
    for move in moves:
        with pytest.raises(errors.ModelChanged, match="dtype"):
            move()
    with pytest.raises(errors.ModelChanged, match="meta"):
        compiled.to("meta")
    assert {p.dtype for p in compiled.parameters()} == {torch.float32}
    compiled(**lm_batch()).backward()
    before = [s.grad for s in compiled.active_slices()]
    assert compiled.to("cpu") is compiled
    assert all(a is not None and torch.equal(a, s.grad) for a, s in zip(before, compiled.active_slices(), strict=True))


def test_added_weights_without_a_place_in_the_batch_do_not_disturb_other_hooks() -> None:
    """Hooks that the user registers see the gradient as the gate leaves it, for active and other parameters."""
    compiled = lm_compiled(chunks=2)
    seen: dict[str, Tensor | None] = {}
    for name, p in compiled.named_parameters():
        p.register_post_accumulate_grad_hook(lambda q, n=name: seen.update({n: q.grad}))
    (compiled(**lm_batch()) + sum(p.sum() for p in compiled.parameters())).backward()
    active = {s.name for s in compiled.active_slices()}
    assert {n for n, g in seen.items() if g is not None} == active
    assert set(seen) == set(dict(compiled.named_parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_that_got_another_dtype_behind_compile_trains_as_one_that_had_it(dtype: torch.dtype) -> None:
    weights = []
    for compiled in (lm_compiled(tiny_lm().to(dtype)), lm_compiled(tiny_lm()).to(dtype)):
        optimizer = chunkft_fx.AdamW(compiled, lr=1e-2)
        for step in range(3):
            compiled(**lm_batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([p.detach().clone() for p in compiled.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))

"""Steps that are not the plain forward-backward pair: accumulation, evaluation between, failures, stale calls."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx import errors
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.tools.zoo import tiny
from tests.support.equivalence import dense_gradients, loss_of


def make(family: str = "llama", chunks: int = 3, **options: Any) -> tuple[nn.Module, CompiledModule, Any]:
    model, batch = tiny(family, dtype=torch.float64)
    model.train()
    compiled = chunkft_fx.compile(copy.deepcopy(model), "64GB", chunks=chunks, backend="eager", **options)
    compiled.activate(chunks - 2 if chunks > 1 else 0)
    return model, compiled, batch


def assert_active_equals(compiled: CompiledModule, dense: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for s in compiled.active_slices():
        wanted = dense[s.name] if s.slice.is_whole else dense[s.name].narrow(s.dim, s.start, s.length)
        assert s.grad is not None, s.name
        torch.testing.assert_close(
            s.grad, wanted.to(s.grad.dtype), rtol=tolerance, atol=tolerance * float(wanted.abs().max())
        )


def test_gradients_accumulate_over_backward_calls() -> None:
    model, compiled, batch = make()
    total: dict[str, Tensor] = {}
    for seed in range(3):
        _, dense = dense_gradients(model, batch(2, 12, seed))
        total = {n: g + total[n] if total else g for n, g in dense.items()}
        loss_of(compiled(**batch(2, 12, seed))).backward()
    assert_active_equals(compiled, total)


def test_two_forwards_before_their_backwards() -> None:
    model, compiled, batch = make()
    first, second = (loss_of(compiled(**batch(2, 12, seed))) for seed in (0, 1))
    second.backward()
    _, dense = dense_gradients(model, batch(2, 12, 1))
    assert_active_equals(compiled, dense)
    first.backward()
    _, other = dense_gradients(model, batch(2, 12, 0))
    assert_active_equals(compiled, {n: g + other[n] for n, g in dense.items()})


def test_a_dropped_module_is_freed_once_its_backward_has_run() -> None:
    """Though the plain model lives on, and torch keeps what was compiled for it."""
    model, batch = tiny("llama", dtype=torch.float64)
    _, dense = dense_gradients(model, batch(2, 12, 0))
    compiled = chunkft_fx.compile(model, "64GB", chunks=3, interval=1, backend="eager")
    loss = loss_of(compiled(**batch(2, 12, 0)))
    slices, module = compiled.active_slices(), weakref.ref(compiled)
    del compiled
    gc.collect()
    loss.backward()
    for s in slices:
        assert s.grad is not None
        torch.testing.assert_close(s.grad, dense[s.name].narrow(s.dim, s.start, s.length), rtol=1e-9, atol=1e-12)
    del loss
    gc.collect()
    assert module() is None


def test_one_loss_made_of_two_forwards() -> None:
    model, compiled, batch = make()
    (loss_of(compiled(**batch(2, 12, 0))) * 2 + loss_of(compiled(**batch(2, 12, 1)))).backward()
    a, b = (dense_gradients(model, batch(2, 12, seed))[1] for seed in (0, 1))
    assert_active_equals(compiled, {n: 2 * g + b[n] for n, g in a.items()})


def test_evaluation_between_forward_and_backward() -> None:
    model, compiled, batch = make("gpt2")
    loss = loss_of(compiled(**batch(2, 12, 0)))
    compiled.eval()
    with torch.no_grad():
        evaluated = compiled(**batch(2, 12, 1))
    plain = copy.deepcopy(model).eval()
    torch.testing.assert_close(loss_of(evaluated), loss_of(plain(**batch(2, 12, 1))), rtol=1e-9, atol=0)
    assert not loss_of(evaluated).requires_grad
    compiled.train()
    loss.backward()
    assert_active_equals(compiled, dense_gradients(model, batch(2, 12, 0))[1])


def test_backward_twice_is_refused() -> None:
    _, compiled, batch = make()
    loss = loss_of(compiled(**batch(2, 12, 0)))
    loss.backward()
    before = [s.grad.clone() for s in compiled.active_slices() if s.grad is not None]
    with pytest.raises(errors.StaleBackward, match="second time"):
        loss.backward()
    after = [s.grad for s in compiled.active_slices() if s.grad is not None]
    assert all(map(torch.equal, before, after))


def test_retain_graph_allows_a_second_backward() -> None:
    model, compiled, batch = make()
    loss = loss_of(compiled(**batch(2, 12, 0)))
    loss.backward(retain_graph=True)
    loss.backward()
    assert_active_equals(compiled, {n: 2 * g for n, g in dense_gradients(model, batch(2, 12, 0))[1].items()})


def test_backward_after_a_chunk_switch_is_refused() -> None:
    _, compiled, batch = make()
    loss = loss_of(compiled(**batch(2, 12, 0)))
    compiled.activate(0)
    with pytest.raises(errors.StaleBackward, match="active chunk changed"):
        loss.backward()
    assert all(s.grad is None for s in compiled.active_slices())


def test_backward_after_a_weight_change_is_refused() -> None:
    _, compiled, batch = make()
    loss = loss_of(compiled(**batch(2, 12, 0)))
    with torch.no_grad():
        compiled.get_parameter("lm_head.weight").mul_(0.5)
    with pytest.raises(errors.StaleBackward, match="changed in place"):
        loss.backward()


def test_a_failure_inside_backward_leaves_gradients_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model, compiled, batch = make()
    loss_of(compiled(**batch(2, 12, 0))).backward()
    _, dense = dense_gradients(model, batch(2, 12, 0))
    loss = loss_of(compiled(**batch(2, 12, 1)))
    lowest = compiled.program.variants[compiled.program.lowest]

    def fail(inputs: list[Any]) -> Any:
        raise RuntimeError("out of memory, say")

    with monkeypatch.context() as patch:
        patch.setattr(lowest, "run_backward", fail)
        with pytest.raises(RuntimeError, match="say"):
            loss.backward()
    assert_active_equals(compiled, dense)
    loss_of(compiled(**batch(2, 12, 1))).backward()
    _, other = dense_gradients(model, batch(2, 12, 1))
    assert_active_equals(compiled, {n: g + other[n] for n, g in dense.items()})


def test_saved_activations_are_dropped_as_backward_proceeds(monkeypatch: pytest.MonkeyPatch) -> None:
    _, compiled, batch = make()
    compiled.activate(0)
    loss = loss_of(compiled(**batch(2, 12, 0)))
    weights = {id(p) for p in compiled.parameters()}
    slots = loss.grad_fn.step.slots  # type: ignore[union-attr]
    saved = [weakref.ref(v) for v in slots.values() if isinstance(v, Tensor) and id(v) not in weights]
    lowest = compiled.program.variants[compiled.program.lowest]
    run, alive = lowest.run_backward, []

    def watch(inputs: list[Any]) -> Any:
        alive.append(sum(r() is not None for r in saved))
        assert run is not None or lowest.backward is not None
        return lowest.backward(*inputs) if run is None else run(inputs)  # type: ignore[misc]

    monkeypatch.setattr(lowest, "run_backward", watch)
    del slots
    loss.backward()
    assert len(saved) > 30
    assert alive[0] < 12  # what the lowest region itself reads, and shared inputs


def test_gradients_of_outputs_beside_the_loss() -> None:
    """Logits get a gradient although only the loss was expected to: the forward is run again for both."""
    model, compiled, batch = make("gpt2")

    def objective(result: Any) -> Tensor:
        return result.loss + result.logits.square().mean()

    plain = copy.deepcopy(model)
    objective(plain(**batch(2, 12, 0))).backward()
    for _ in range(2):
        for s in compiled.active_slices():
            s.grad = None
        objective(compiled(**batch(2, 12, 0))).backward()
        assert_active_equals(compiled, {n: p.grad for n, p in plain.named_parameters() if p.grad is not None})


def test_an_expected_gradient_that_does_not_come_counts_as_zero() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.a(x).tanh()
            return h, self.b(h)

    model = Two().double()
    compiled = chunkft_fx.compile(copy.deepcopy(model), "1GB", chunks=1, backend="eager")
    x = torch.randn(3, 4, dtype=torch.float64)
    compiled(x)[0].sum().backward()
    model(x)[0].sum().backward()
    for s in compiled.active_slices():
        wanted = model.get_parameter(s.name).grad
        torch.testing.assert_close(s.grad, torch.zeros_like(s.parameter) if wanted is None else wanted)


def test_inputs_that_need_a_gradient_get_it() -> None:
    model, compiled, batch = make()
    labels = batch(2, 12, 0)["labels"]
    embeds = torch.randn(2, 12, 64, dtype=torch.float64, requires_grad=True)
    compiled(inputs_embeds=embeds, labels=labels).loss.backward()
    got, embeds.grad = embeds.grad, None
    copy.deepcopy(model)(inputs_embeds=embeds, labels=labels).loss.backward()
    torch.testing.assert_close(got, embeds.grad, rtol=1e-9, atol=1e-12)


def test_running_statistics_are_updated_as_in_the_plain_model() -> None:
    model, compiled, batch = make("cnn")
    plain = copy.deepcopy(model)
    for seed in range(3):
        loss_of(compiled(**batch(4, 12, seed))).backward()
        plain(**batch(4, 12, seed))
    buffers = dict(plain.named_buffers())
    assert buffers
    for name, value in compiled.named_buffers():
        torch.testing.assert_close(value, buffers[name], rtol=1e-12, atol=1e-12)


def test_varying_lengths_are_captured_at_most_twice() -> None:
    model, compiled, batch = make()
    for length in (12, 15, 9, 21, 33):
        for s in compiled.active_slices():
            s.grad = None
        loss_of(compiled(**batch(2, length, 0))).backward()
        assert_active_equals(compiled, dense_gradients(model, batch(2, length, 0))[1])
    assert len(compiled._training.sessions) == 2


def test_autocast_matches_the_plain_model() -> None:
    model, batch = tiny("llama")
    compiled = chunkft_fx.compile(copy.deepcopy(model), "64GB", chunks=3, interval=1, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        _, dense = dense_gradients(model, batch(2, 12, 0))
        loss = loss_of(compiled(**batch(2, 12, 0)))
    loss.backward()
    assert_active_equals(compiled, dense, 1e-6)


def test_the_compiled_module_stands_in_for_the_model() -> None:
    model, compiled, batch = make()
    assert list(compiled.state_dict()) == list(model.state_dict())
    assert all(map(torch.equal, compiled.state_dict().values(), model.state_dict().values()))
    assert [n for n, _ in compiled.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in compiled.named_modules()] == [n for n, _ in model.named_modules()]
    assert compiled.config.hidden_size == 64
    assert compiled.generate(batch(1, 4, 0)["input_ids"], max_new_tokens=2, do_sample=False).shape == (1, 6)
    assert compiled.eval().training is False
    assert all(not m.training for m in compiled.modules())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_independent_and_compiled(how: str) -> None:
    model, compiled, batch = make("mlp")
    copied = copy.deepcopy(compiled) if how == "deepcopy" else pickle.loads(pickle.dumps(compiled))
    assert isinstance(copied, CompiledModule)
    assert copied.plan.chunks == compiled.plan.chunks
    with torch.no_grad():
        next(compiled.parameters()).zero_()
    copied.activate(compiled.chunk)
    loss_of(copied(**batch(4, 12, 0))).backward()
    assert_active_equals(copied, dense_gradients(model, batch(4, 12, 0))[1])


def test_loading_weights_reaches_the_model() -> None:
    model, compiled, _ = make("mlp")
    values = {n: v + 1 for n, v in model.state_dict().items()}
    compiled.load_state_dict(values)
    assert all(torch.equal(v, values[n]) for n, v in compiled.state_dict().items())

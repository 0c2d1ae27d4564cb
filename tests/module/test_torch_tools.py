"""Tools of torch and of trainers that read or change gradients, on a compiled module as on a plain one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

import chunkft_fx
from chunkft_fx.gradients.slice_gradient import part_of
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.tools.zoo import tiny
from tests.support.small_net import Net, batch, compiled, net

Clip = Callable[[CompiledModule, torch.optim.Optimizer, float], Any]


def cut_gradients(module: CompiledModule, plain: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of the plain model's gradients of a loss, wide, what belongs to the active slices."""
    active = {s.name: s.slice for s in module.active_slices()}
    names = [n for n, p in plain.named_parameters() if n in active]
    found = torch.autograd.grad(loss, [plain.get_parameter(n) for n in names], allow_unused=True)
    parts = {n: part_of(g, active[n]) for n, g in zip(names, found, strict=True)}
    return {n: g.to(torch.promote_types(g.dtype, torch.float32)) for n, g in parts.items() if g is not None}


def norm_of(gradients: dict[str, Tensor]) -> float:
    return float(sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5)


def assert_gradients(module: CompiledModule, want: dict[str, Tensor], rtol: float) -> None:
    have = {s.name: s.grad for s in module.active_slices() if s.grad is not None}
    assert have.keys() == want.keys()
    for name, g in want.items():
        torch.testing.assert_close(have[name], g, rtol=rtol, atol=rtol * float(g.abs().max()), msg=name)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-10), (torch.bfloat16, 2e-2)])
def test_torchs_clipping_measures_and_clips_the_active_slices(dtype: torch.dtype, rtol: float) -> None:
    module, plain = compiled(net(dtype), 3), net(dtype)
    for chunk in range(3):
        module.activate(chunk)
        want = cut_gradients(module, plain, plain(batch(0, dtype)))
        before = norm_of(want)
        for foreach in (None, True, False):
            module.zero_grad()
            module(batch(0, dtype)).backward()
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            assert float(get_total_norm(gradients, foreach=foreach)) == pytest.approx(before, rel=rtol)
            for kind in (1.0, float("inf")):
                dense = float(get_total_norm(list(want.values()), kind))
                assert float(get_total_norm(gradients, kind, foreach=foreach)) == pytest.approx(dense, rel=rtol)
            assert_gradients(module, want, rtol)
            found = clip_grad_norm_(module.parameters(), before / 3, foreach=foreach)
            assert float(found) == pytest.approx(before, rel=rtol)
            assert_gradients(module, {n: g / 3 for n, g in want.items()}, max(rtol, 1e-4))
            most = max(float(g.abs().max()) for g in want.values()) / 6
            clip_grad_value_(module.parameters(), most, foreach=foreach)
            clipped = {n: (g / 3).clamp(-most, most) for n, g in want.items()}
            assert any((g / 3).abs().max() > most for g in want.values())
            assert_gradients(module, clipped, max(rtol, 1e-4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("clips", [True, False])
def test_a_gradient_scaler_skips_a_step_that_overflows_and_goes_on(dtype: torch.dtype, clips: bool) -> None:
    """Scales are powers of two, so float32 training is the same to the bit without the scaler."""
    scaled, straight = compiled(net(dtype), 3), compiled(net(dtype), 3)
    ours, theirs = (chunkft_fx.AdamW(m, lr=0.01) for m in (scaled, straight))
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=100)
    scale = 16.0
    for step in range(8):
        overflows = step in (2, 3, 6)
        chunk, before = scaled.chunk, [p.detach().clone() for p in scaled.parameters()]
        states = copy.deepcopy(ours.state_dict()) if overflows else None
        ours.zero_grad()
        loss = scaled(batch(step, dtype))
        scaler.scale(loss * float("inf") if overflows else loss).backward()
        if clips:
            scaler.unscale_(ours)
            clip_grad_norm_(scaled.parameters(), 0.1)
        scaler.step(ours)
        scaler.update()
        if overflows:
            scale /= 2
            assert scaled.chunk == chunk
            assert all(torch.equal(p, q) for p, q in zip(scaled.parameters(), before, strict=True))
            assert states is not None
            assert states["chunkft"] == ours.state_dict()["chunkft"]
        else:
            theirs.zero_grad()
            straight(batch(step, dtype)).backward()
            if clips:
                clip_grad_norm_(straight.parameters(), 0.1)
            theirs.step()
            assert scaled.chunk == (chunk + 1) % 3
            assert any(not torch.equal(p, q) for p, q in zip(scaled.parameters(), before, strict=True))
        assert scaler.get_scale() == scale
    for p, q in zip(scaled.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0 if dtype == torch.float32 else 2e-3)


class Wrapping(nn.Module):
    """What a trainer puts around a model."""

    def __init__(self, inner: CompiledModule) -> None:
        super().__init__()
        self.inner = inner


def test_every_zero_grad_drops_or_zeroes() -> None:
    module = compiled(net(), 3)
    optimizer = chunkft_fx.AdamW(module)
    for drop in (optimizer.zero_grad, module.zero_grad, Wrapping(module).zero_grad):
        module(batch(0)).backward()
        graded = [s for s in module.active_slices() if s.grad is not None]
        kept = [s.grad for s in graded]
        assert kept and all(bool(g.any()) for g in kept if g is not None)
        drop(set_to_none=False)
        assert all(s.grad is g for s, g in zip(graded, kept, strict=True))
        assert not any(bool(g.any()) for g in kept if g is not None)
        module(batch(0)).backward()
        assert all(s.grad is g and bool(g.any()) for s, g in zip(graded, kept, strict=True) if g is not None)
        drop()
        assert all(p.grad is None for p in module.parameters())


def test_trainer_logs_and_clips_the_norm_of_the_dense_gradient_of_the_active_slices(tmp_path: Path) -> None:
    model, tiny_batch = tiny("llama")
    plain = copy.deepcopy(model)
    data = tiny_batch(8, 12, 0)
    rows = [{key: value[0] for key, value in data.items()}] * 8
    whole = {key: value[:1].expand(8, -1) for key, value in data.items()}
    module = chunkft_fx.compile(model, "1GB", chunks=3, interval=1, backend="eager")
    optimizer = chunkft_fx.AdamW(module, lr=1e-2)
    expected: list[float] = []
    clipped: list[float] = []

    class Measures(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            plain.load_state_dict(module.state_dict())
            expected.append(norm_of(cut_gradients(module, plain, plain(**whole).loss)))

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            clipped.append(norm_of({s.name: s.grad for s in module.active_slices() if s.grad is not None}))

    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=7, use_cpu=True, report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True
    )
    trainer = transformers.Trainer(
        module, arguments, train_dataset=rows, optimizers=(optimizer, None), callbacks=[Measures()]
    )
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(logged) == 7
    assert logged == pytest.approx(expected, rel=1e-5)
    assert max(logged) > 1.0  # or nothing was clipped
    assert clipped == pytest.approx([min(1.0, norm) for norm in logged], rel=1e-4)
    assert module.schedule.state_dict()["sweep"] == 2


def clips_and_trains(module: CompiledModule, clip: Clip, optimizer: Any, backward: Callable[[Tensor], Any]) -> None:
    """Six steps; at each the tool's norm is that of the dense gradients of the same slices, and it clips to half."""
    plain = Net()
    for step in range(6):
        plain.load_state_dict(module.state_dict())
        want = cut_gradients(module, plain, plain(batch(step)))
        before, chunk = norm_of(want), module.chunk
        optimizer.zero_grad()
        backward(module(batch(step)))
        assert_gradients(module, want, 1e-5)
        found = clip(module, optimizer, before / 2)
        assert float(found) == pytest.approx(before, rel=1e-5)
        assert_gradients(module, {n: g / 2 for n, g in want.items()}, 1e-4)
        optimizer.step()
        assert module.chunk == (chunk + 1) % 3
        assert any(not torch.equal(p, q) for p, q in zip(module.parameters(), plain.parameters(), strict=True))


def test_accelerate_clips_the_active_slices() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    module = compiled(net(), 3)
    prepared, optimizer = accelerator.prepare(module, chunkft_fx.AdamW(module, lr=1e-2))

    def clip(_: CompiledModule, optimizer: Any, norm: float) -> Any:
        return accelerator.clip_grad_norm_(prepared.parameters(), norm)

    clips_and_trains(module, clip, optimizer, accelerator.backward)
    optimizer.zero_grad()
    accelerator.backward(prepared(batch(0)))
    accelerator.clip_grad_value_(prepared.parameters(), 1e-4)
    assert max(float(s.grad.abs().max()) for s in module.active_slices() if s.grad is not None) <= 1e-4


def test_fabric_clips_the_active_slices() -> None:
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    module = compiled(net(), 3)
    wrapped, optimizer = fabric.setup(module, chunkft_fx.AdamW(module, lr=1e-2))

    def clip(_: CompiledModule, optimizer: Any, norm: float) -> Any:
        return fabric.clip_gradients(wrapped, optimizer, max_norm=norm)

    clips_and_trains(module, clip, optimizer, fabric.backward)
    optimizer.zero_grad()
    fabric.backward(wrapped(batch(0)))
    fabric.clip_gradients(wrapped, optimizer, clip_val=1e-4)
    assert max(float(s.grad.abs().max()) for s in module.active_slices() if s.grad is not None) <= 1e-4

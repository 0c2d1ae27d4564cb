"""Accelerate and Lightning train a compiled model as they do the plain one: losses, weights, and what resumes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from tests.support.small_net import net

accelerate = pytest.importorskip("accelerate")
lightning = pytest.importorskip("lightning")
ModelCheckpoint = pytest.importorskip("lightning.pytorch.callbacks").ModelCheckpoint

# Lightning's advice on loaders, loggers and its own use of torch
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*torch.load. with .weights_only.*"),
]

WAYS: dict[str, dict[str, Any]] = {
    "all": {"coverage": "all"},
    "one chunk": {"coverage": "one", "chunks": 1},
    "3 chunks": {"coverage": "one", "chunks": 3, "interval": 1},
}
ways = pytest.mark.parametrize("way", [w for w in WAYS if w != "3 chunks"])
STEPS, ACCUMULATED = 6, 2


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 5, 12, generator=generator) for _ in range(STEPS * ACCUMULATED)]


def pair(way: str | None) -> tuple[Any, Any]:
    """A model, compiled unless ``way`` is None, and its AdamW."""
    model = net()
    if way is None:
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    compiled = chunkft_fx.compile(model, "1GB", backend="eager", **WAYS[way])
    return compiled, chunkft_fx.AdamW(compiled, lr=1e-2, weight_decay=0.1)


def assert_same(ours: Any, plain: nn.Module) -> None:
    """Weights are the same, and those of everything that has gradients changed."""
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5, msg=name)
    assert_all_trained(ours)


def assert_all_trained(ours: Any) -> None:
    for (name, p), q in zip(ours.named_parameters(), net().parameters(), strict=True):
        assert torch.equal(p, q) == (name.endswith("unused")), name


class Accelerated:
    """A loop as Accelerate's users write it: warm-up, accumulation, clipping."""

    def __init__(self, way: str | None) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
        model, optimizer = pair(way)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
        batches: Any = data()
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        self.parts = self.accelerator.prepare(model, optimizer, loader, schedule)
        self.model = model

    def run(self, first: int = 0, end: int = STEPS * ACCUMULATED) -> list[float]:
        model, optimizer, loader, schedule = self.parts
        return list(self._losses(model, optimizer, list(loader)[first:end], schedule))

    def _losses(self, model: Any, optimizer: Any, batches: list[Tensor], schedule: Any) -> Iterator[float]:
        for x in batches:
            with self.accelerator.accumulate(model):
                loss = model(x)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            yield float(loss.detach())


@ways
def test_a_loop_of_accelerate_is_the_plain_ones(way: str) -> None:
    plain, ours = Accelerated(None), Accelerated(way)
    assert ours.run() == pytest.approx(plain.run(), abs=1e-5)
    assert_same(ours.model, plain.model)


@pytest.mark.parametrize("way", WAYS)
def test_accelerate_saves_and_goes_on(tmp_path: Path, way: str) -> None:
    half = STEPS * ACCUMULATED // 2
    whole, saved, again = Accelerated(way), Accelerated(way), Accelerated(way)
    losses = whole.run()
    saved.run(0, half)
    saved.accelerator.save_state(str(tmp_path), safe_serialization=False)
    again.accelerator.load_state(str(tmp_path))
    assert again.run(half) == losses[half:]
    assert all(torch.equal(p, q) for p, q in zip(again.model.parameters(), whole.model.parameters(), strict=True))
    assert_all_trained(whole.model)


class Lit(lightning.LightningModule):  # type: ignore[misc, name-defined, unused-ignore]
    """A module of Lightning around a model and its optimizer."""

    def __init__(self, way: str | None) -> None:
        super().__init__()
        self.model, self.made = pair(way)
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss: Tensor = self.model(batch)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        schedule = torch.optim.lr_scheduler.LinearLR(self.made, 0.1, total_iters=4)
        return [self.made], [{"scheduler": schedule, "interval": "step"}]


def fit(module: Lit, folder: Path, resume: Path | None = None) -> Path:
    """Train for two epochs; the path of the checkpoint behind the first."""
    saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=STEPS, accumulate_grad_batches=ACCUMULATED, gradient_clip_val=0.05, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[saving], default_root_dir=folder,
    )  # fmt: skip
    epoch: Any = data()[: STEPS // 2 * ACCUMULATED]
    trainer.fit(module, torch.utils.data.DataLoader(epoch, batch_size=None), ckpt_path=resume)
    return folder / "epoch=0.ckpt"


@ways
def test_lightnings_trainer_is_the_plain_ones(tmp_path: Path, way: str) -> None:
    plain, ours = Lit(None), Lit(way)
    fit(plain, tmp_path / "plain")
    fit(ours, tmp_path / "ours")
    assert ours.losses == pytest.approx(plain.losses, abs=1e-5)
    assert_same(ours.model, plain.model)


@ways
def test_lightnings_trainer_goes_on_as_the_plain_one_does(tmp_path: Path, way: str) -> None:
    """With accumulation Lightning itself leaves out a batch then."""
    resumed = []
    for how in (None, way):
        first, again = Lit(how), Lit(how)
        path = fit(first, tmp_path / f"{how} first")
        fit(again, tmp_path / f"{how} again", resume=path)
        resumed.append(again)
    plain, ours = resumed
    assert ours.losses == pytest.approx(plain.losses, abs=1e-5)
    assert len(ours.losses) < STEPS * ACCUMULATED
    assert_same(ours.model, plain.model)


@ways
def test_a_loop_of_fabric_is_the_plain_ones(way: str) -> None:
    losses: list[list[float]] = []
    models: list[Any] = []
    for how in (None, way):
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        model, optimizer = pair(how)
        wrapped, stepped = fabric.setup(model, optimizer)
        losses.append([])
        for i, x in enumerate(data()):
            is_last = i % ACCUMULATED == ACCUMULATED - 1
            with fabric.no_backward_sync(wrapped, enabled=not is_last):
                loss = wrapped(x)
                fabric.backward(loss / ACCUMULATED)
            if is_last:
                fabric.clip_gradients(wrapped, stepped, max_norm=0.05)
                stepped.step()
                stepped.zero_grad()
            losses[-1].append(float(loss.detach()))
        models.append(model)
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert_same(models[1], models[0])


@pytest.mark.parametrize("way", WAYS)
def test_fabric_saves_and_goes_on(tmp_path: Path, way: str) -> None:
    def step(made: Any, x: Tensor) -> None:
        model, optimizer = made
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()

    fabric, batches = lightning.Fabric(accelerator="cpu", devices=1), data()
    first, again = (fabric.setup(*pair(way)) for _ in range(2))
    for x in batches[:4]:
        step(first, x)
    fabric.save(tmp_path / "state.ckpt", {"model": first[0], "optimizer": first[1]})
    fabric.load(tmp_path / "state.ckpt", {"model": again[0], "optimizer": again[1]})
    for x in batches[4:]:
        step(first, x)
        step(again, x)
    for p, q in zip(first[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(p, q)
    assert_all_trained(first[0])

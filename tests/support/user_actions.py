"""What users do to a model in training, as actions that a test draws in any order: see `test_user_actions`.

Each action is done to the compiled module and to the reference's plain model alike, then both must hold the same
weights; or it ends in a `ChunkFTError`, after which the compiled model must be what it was before.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import chunkft_fx
from chunkft_fx import errors
from tests.support.reference_loop import Reference

VOCABULARY, WIDTH = 11, 6


class SmallModel(nn.Module):
    """Two equal blocks between a tied embedding and head, a buffer that forward writes, and a part few batches use."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.image = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))
        self.factor = 1.0

    def forward(
        self, ids: Tensor | None = None, labels: Tensor | None = None, embeds: Tensor | None = None, image: Any = None
    ) -> Tensor:
        self.calls += 1
        x = self.embed(ids) if embeds is None else embeds
        if image is not None:
            x = x + self.image(image)[:, None]
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        logits = self.head(x) * self.factor
        return logits if labels is None else cross_entropy(logits.flatten(0, 1), labels.flatten())


@dataclass
class Run:
    """A compiled module beside the reference, and what the actions so far have left behind."""

    compiled: Any  # a CompiledModule that has what its model has
    optimizer: chunkft_fx.AdamW
    reference: Reference
    shape: tuple[int, int] = (2, 3)
    batches: int = 0
    handles: list[Any] = field(default_factory=list)
    was_stepped: bool = False

    def batch(self) -> dict[str, Tensor]:
        """The next batch: ``ids`` and ``labels`` of the present shape."""
        self.batches += 1
        generator = torch.Generator().manual_seed(self.batches)
        draw = [torch.randint(0, VOCABULARY, self.shape, generator=generator) for _ in range(2)]
        return {"ids": draw[0], "labels": draw[1]}

    def both(self, action: Callable[[Any], Any]) -> None:
        """Do the same to the compiled module and to the plain one."""
        action(self.compiled)
        action(self.reference.model)

    def finish(self, norm: float | None = None) -> None:
        """Step and drop the gradients, clipped to ``norm`` by torch's own function if it is given."""
        active = [s.slice for s in self.compiled.active_slices()]
        if norm is not None:
            found = float(torch.nn.utils.clip_grad_norm_(self.compiled.parameters(), norm))
            wanted = self.reference.slice_norm(active)
            assert found == pytest.approx(wanted, rel=1e-5, abs=1e-9)
            self.reference.scale(min(1.0, norm / (wanted + 1e-6)))
        self.optimizer.step()
        self.reference.step(active)
        self.was_stepped = True
        self.optimizer.zero_grad()
        self.reference.zero()

    def check(self) -> None:
        """Both models hold the same parameters and buffers."""
        plain = self.reference.model.state_dict()
        mine = self.compiled.state_dict()
        assert list(plain) == list(mine)
        for name, value in plain.items():
            tolerance = 1e-9 if value.dtype == torch.float64 else 2e-4
            torch.testing.assert_close(mine[name], value, rtol=tolerance, atol=tolerance, msg=_naming(name))


def _naming(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"


def new_run(
    chunks: int | str,
    order: str,
    interval: int,
    dtype: torch.dtype = torch.float64,
    coverage: str = "one",
) -> Run:
    """A fresh model, compiled, with its optimizer."""
    torch.manual_seed(0)
    model = SmallModel().to(dtype)
    plain = copy.deepcopy(model)
    compiled = chunkft_fx.compile(
        model,
        "1GB",
        chunks=chunks,
        coverage=coverage,
        order=order,
        interval=interval,
        backend="eager",
        return_logits=True,
    )
    return Run(compiled, chunkft_fx.AdamW(compiled, lr=1e-2), Reference(plain))


def train(run: Run) -> None:
    batch = run.batch()
    run.both(lambda m: m(**batch).backward())
    run.finish()


def train_clipped(run: Run) -> None:
    batch = run.batch()
    run.both(lambda m: (3 * m(**batch)).backward())
    run.finish(norm=0.5)


def train_scaled(run: Run) -> None:
    """A gradient scaler whose first step overflows: it is skipped, the chunk stays, the scale is halved."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    chunk, batch = run.compiled.chunk, run.batch()
    scaler.scale(run.compiled(**batch) * float("inf")).backward()
    run.reference.model(**batch)
    if all(s.grad is None for s in run.compiled.active_slices()):  # frozen, say: a scaler has nothing to check
        with pytest.raises(errors.NoGradientToScale, match=r"optimizer\.step\(\)"):
            scaler.step(run.optimizer)
        run.reference.zero()
        run.finish()
        return
    scaler.step(run.optimizer)
    scaler.update()
    run.optimizer.zero_grad()
    assert run.compiled.chunk == chunk
    assert scaler.get_scale() == 2.0**9
    scaler.scale(run.compiled(**batch)).backward()
    run.reference.model(**batch).backward()
    active = [s.slice for s in run.compiled.active_slices()]
    scaler.step(run.optimizer)
    run.reference.step(active)
    run.was_stepped = True
    run.optimizer.zero_grad()
    run.reference.zero()


def accumulate(run: Run) -> None:
    for _ in range(2):
        batch = run.batch()
        run.both(_halved(batch))
    run.finish()


def _halved(batch: dict[str, Tensor]) -> Callable[[Any], None]:
    return lambda m: (m(**batch) / 2).backward()


def accumulate_together(run: Run) -> None:
    """Three micro-batches in one step; with a hook on the call, that is refused and changes nothing."""
    batches = [run.batch() for _ in range(3)]
    hooks = run.compiled._call_hooks
    if any(hooks.values()):
        with pytest.raises(errors.OptionError, match="hooks"):
            run.compiled.accumulate(batches)
        return
    sum(w * loss for w, loss in zip((0.5, 0.2, 0.3), run.compiled.accumulate(batches), strict=True)).backward()
    for w, batch in zip((0.5, 0.2, 0.3), batches, strict=True):
        (w * run.reference.model(**batch)).backward()
    run.finish()


def two_losses(run: Run) -> None:
    """Two forwards before their backward passes, the second loss through another path of the caller's."""
    first, second = run.batch(), run.batch()

    def losses(m: Any) -> None:
        a, b = m(**first), m(ids=second["ids"]).square().mean()
        (a * b).backward()

    run.both(losses)
    run.finish()


def retain(run: Run) -> None:
    batch = run.batch()

    def twice(m: Any) -> None:
        loss = m(**batch)
        loss.backward(retain_graph=True)
        loss.backward()

    run.both(twice)
    run.finish()


def outside_lookup(run: Run) -> None:
    batch = run.batch()
    run.both(lambda m: m(embeds=m.embed(batch["ids"]), labels=batch["labels"]).backward())
    run.finish()


def outside_penalty(run: Run) -> None:
    batch = run.batch()
    run.both(lambda m: (m(**batch) + 0.1 * sum(p.square().sum() for p in m.parameters() if p.requires_grad)).backward())
    run.finish()


def with_image(run: Run) -> None:
    batch = run.batch()
    dtype = run.compiled.embed.weight.dtype
    image = torch.linspace(-1, 1, 3 * run.shape[0], dtype=dtype).view(run.shape[0], 3)
    run.both(lambda m: m(**batch, image=image).backward())
    run.finish()


def evaluate(run: Run) -> None:
    batch = run.batch()
    values: list[Tensor] = []

    def value(m: Any) -> None:
        m.eval()
        with torch.no_grad():
            values.append(m(**batch))
        m.train()

    run.both(value)
    torch.testing.assert_close(values[0], values[1])


def evaluate_with_gradients(run: Run) -> None:
    batch = run.batch()

    def value(m: Any) -> None:
        m.eval()
        m(**batch)
        m.train()

    run.both(value)


def skip(run: Run) -> None:
    """A backward whose gradients are dropped before the step."""
    batch = run.batch()
    run.both(lambda m: m(**batch).backward())
    run.optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is None or not bool(p.grad.any()) for p in run.compiled.parameters())
    run.optimizer.zero_grad()
    run.reference.zero()
    chunk = run.compiled.schedule.state_dict()
    for p in run.compiled.parameters():
        assert p.grad is None
    assert run.compiled.schedule.state_dict() == chunk


def raise_in_forward(run: Run) -> None:
    batch = run.batch()
    wrong = {"ids": batch["ids"], "labels": batch["labels"][:, :-1]}
    for m in (run.compiled, run.reference.model):
        with pytest.raises(Exception):  # noqa: B017, PT011 - torch's own error of the plain model
            m(**wrong)
    # how far a forward comes that fails is torch's matter, and with it what it has written
    model: Any = run.reference.model
    model.calls.copy_(run.compiled.calls)


def raise_in_backward(run: Run) -> None:
    batch = run.batch()

    class Failure(Exception):
        pass

    def fail(gradient: Tensor) -> None:
        raise Failure

    def failing(m: Any) -> None:
        dtype = m.get_parameter("embed.weight").dtype
        embeds = torch.ones(*run.shape, WIDTH, dtype=dtype, requires_grad=True)
        embeds.register_hook(fail)
        with pytest.raises(Failure):
            m(embeds=embeds, labels=batch["labels"]).backward()
        m.zero_grad()

    run.both(failing)


def raise_in_step(run: Run) -> None:
    batch = run.batch()
    run.both(lambda m: m(**batch).backward())
    group = run.optimizer.param_groups[0]
    before = copy.deepcopy(run.compiled.state_dict()), run.compiled.schedule.state_dict()
    group["betas"] = (0.9,)
    with pytest.raises(errors.OptionError, match="betas"):
        run.optimizer.step()
    group["betas"] = (0.9, 0.999)
    assert all(map(torch.equal, before[0].values(), run.compiled.state_dict().values()))
    assert run.compiled.schedule.state_dict() == before[1]
    run.finish()


def freeze(run: Run) -> None:
    run.both(lambda m: m.layers[0].requires_grad_(False))


def unfreeze(run: Run) -> None:
    run.both(lambda m: m.layers[0].requires_grad_(True))


def assign(run: Run) -> None:
    """New tensors in the place of all parameters; their values count, and the states go on."""
    run.both(lambda m: m.load_state_dict({k: v.clone() * 0.9 for k, v in m.state_dict().items()}, assign=True))
    models: list[Any] = [run.compiled._model, run.reference.model]
    for m in models:
        m.head.weight = m.embed.weight  # assigned apart, tied again by the user


def load(run: Run) -> None:
    run.both(lambda m: m.load_state_dict({k: v.clone() * 1.1 for k, v in m.state_dict().items()}))


def change_in_place(run: Run) -> None:
    with torch.no_grad():
        run.both(lambda m: m.layers[-1][1].weight.mul_(0.95))


def save_and_load(run: Run) -> None:
    """The optimizer's checkpoint through a file, into the same optimizer."""
    buffer = io.BytesIO()
    torch.save(run.optimizer.state_dict(), buffer)
    buffer.seek(0)
    run.optimizer.load_state_dict(torch.load(buffer, weights_only=True))


def activate(run: Run) -> None:
    run.compiled.activate((run.compiled.chunk + 1) % len(run.compiled.plan.chunks))


def longer(run: Run) -> None:
    run.shape = (run.shape[0], run.shape[1] + 2)


def shorter(run: Run) -> None:
    run.shape = (run.shape[0], max(2, run.shape[1] - 1))


def more_rows(run: Run) -> None:
    run.shape = (run.shape[0] % 3 + 1, run.shape[1])


def set_attribute(run: Run) -> None:
    run.both(lambda m: setattr(m, "factor", 1.5 - m.factor / 2))


def move(run: Run) -> None:
    run.both(lambda m: m.to("cpu"))


def hook(run: Run) -> None:
    """A hook that halves a gradient, and one after accumulation: called as in the plain model."""
    models: list[Any] = [run.compiled, run.reference.model]
    for m in models:
        weight = m.layers[-1][1].weight
        if weight.requires_grad:
            run.handles.append(weight.register_hook(lambda g: g * 0.5))


def unhook(run: Run) -> None:
    for handle in run.handles:
        handle.remove()
    run.handles.clear()


def refuse_double_backward(run: Run) -> None:
    batch = run.batch()
    loss = run.compiled(**batch)
    run.reference.model(**batch)
    with pytest.raises(errors.DoubleBackward, match="twice"):
        loss.backward(create_graph=True)
    run.optimizer.zero_grad()


def refuse_foreign_optimizer(run: Run) -> None:
    batch = run.batch()
    run.both(lambda m: m(**batch).backward())
    with pytest.raises(errors.OptimizerConflict, match=r"chunkft_fx\.AdamW"):
        torch.optim.SGD(run.compiled.parameters(), lr=1.0).step()
    run.finish()


def refuse_plain_model(run: Run) -> None:
    """A loop that calls the plain model: the step is refused, and nothing has changed."""
    if run.compiled._training.arrivals.through or not run.was_stepped:
        return
    batch = run.batch()
    model: Any = run.compiled._model
    model(**batch).backward()
    run.reference.model(**batch)
    if run.compiled._training.arrivals.outside:
        with pytest.raises(errors.OutsideGradient, match=r"chunkft_fx\.compile"):
            run.optimizer.step()
    run.optimizer.zero_grad()


def resize(run: Run) -> None:
    """Another vocabulary: followed before the first step, refused later."""

    def larger(m: Any) -> None:
        old = m.get_parameter("embed.weight")
        m.embed = nn.Embedding(len(old) + 1, WIDTH, dtype=old.dtype)
        with torch.no_grad():
            m.embed.weight.copy_(torch.cat([old, old[:1]]))
        m.head.weight = m.embed.weight

    _followed_or_refused(run, larger)


def grow(run: Run) -> None:
    def more(m: Any) -> None:
        linear = nn.Linear(WIDTH, WIDTH)
        nn.init.constant_(linear.weight, 0.1)
        nn.init.constant_(linear.bias, 0.2)
        m.layers.append(nn.Sequential(nn.LayerNorm(WIDTH), linear).to(m.get_parameter("embed.weight").dtype))

    _followed_or_refused(run, more)


def shrink(run: Run) -> None:
    def fewer(m: Any) -> None:
        del m.layers[-1]

    if len(run.compiled.layers) > 1:
        _followed_or_refused(run, fewer)


def cast(run: Run) -> None:
    """Another dtype: followed before the first step, refused later, before any tensor changes."""
    wanted = torch.float32 if run.compiled.embed.weight.dtype == torch.float64 else torch.float64
    if run.compiled._training.has_begun:
        with pytest.raises(errors.ModelChanged, match="dtype"):
            run.compiled.to(wanted)
        return
    run.both(lambda m: m.to(wanted))
    run.reference.forget()


def _followed_or_refused(run: Run, change: Callable[[Any], None]) -> None:
    if not run.compiled._training.has_begun:
        run.both(change)
        run.handles.clear()
        return
    model: Any = run.compiled._model
    before = dict(model.__dict__["_modules"]), list(model.layers)
    change(run.compiled)
    batch = run.batch()
    with pytest.raises(errors.ModelChanged):
        run.compiled(**batch)
    model.__dict__["_modules"].update(before[0])
    model.layers._modules.clear()
    model.layers.extend(before[1])
    model.head.weight = model.embed.weight


ACTIONS: list[Callable[[Run], None]] = [
    train, train, train, train_clipped, train_scaled, accumulate, accumulate_together, two_losses, retain,
    outside_lookup, outside_penalty, with_image, evaluate, evaluate_with_gradients, skip, raise_in_forward,
    raise_in_backward, raise_in_step, freeze, unfreeze, assign, load, change_in_place, save_and_load, activate, longer,
    shorter, more_rows, set_attribute, move, hook, unhook, refuse_double_backward, refuse_foreign_optimizer,
    refuse_plain_model, resize, grow, shrink, cast,
]  # fmt: skip

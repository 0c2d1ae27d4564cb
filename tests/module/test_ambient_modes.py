"""What surrounds a call and what hangs on its modules counts as in the plain model: autocast, hooks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chunkft_fx import errors
from tests.support.tiny_lm import TinyLM, lm_batch, lm_compiled, tiny_lm


class Exempt(TinyLM):
    """Blocks and positions are computed in float32 whatever surrounds the call; the head is not exempt."""

    def forward(self, ids: Tensor | None = None, labels: Tensor | None = None, embeds: Tensor | None = None) -> Tensor:
        x: Tensor = self.embed(ids) if embeds is None else embeds
        with torch.autocast("cpu", enabled=False):
            positions = torch.arange(x.shape[1]).float()[:, None] @ torch.linspace(1.0, 1.1, x.shape[2])[None]
            x = x.float() + torch.sin(1000 * positions)
            for layer in self.layers:
                x = x + torch.tanh(layer(x))
        return super().forward(labels=labels, embeds=x)


@pytest.mark.parametrize("kind", [TinyLM, Exempt])
def test_autocast_around_a_call_casts_what_it_casts_in_the_plain_model(kind: type[TinyLM]) -> None:
    torch.manual_seed(0)
    model = kind()
    plain, compiled = copy.deepcopy(model), lm_compiled(model, chunks=1)
    batch = lm_batch()

    def losses(m: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = m(**batch)
        loss.backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return [loss.detach(), m.eval()(**batch)]

    for mine, wanted in zip(losses(compiled), losses(plain), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0)
    for p, q in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)


def _halve(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output * 0.5


def _halve_inputs(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(a * 0.5 for a in arguments)


@pytest.mark.parametrize(
    ("part", "register"),
    [
        ("", "register_forward_hook"),
        ("layers.0", "register_forward_hook"),
        ("layers.1.0", "register_forward_pre_hook"),
        ("head", "register_forward_pre_hook"),
    ],
)
def test_hooks_on_modules_count_from_when_they_are_there_until_they_are_gone(part: str, register: str) -> None:
    plain, compiled = tiny_lm(), lm_compiled(tiny_lm(), chunks=1)
    batch = lm_batch()

    def same() -> None:
        assert torch.equal(compiled(**batch), plain(**batch))
        for m in (compiled, plain):
            m.zero_grad()
            m(**batch).backward()
        for p, q in zip(compiled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)

    same()
    hook = _halve if register == "register_forward_hook" else _halve_inputs
    before = plain(**batch)
    handles = [getattr(m.get_submodule(part), register)(hook) for m in (compiled, plain)]
    assert not torch.equal(plain(**batch), before)
    same()
    for handle in handles:
        handle.remove()
    same()


def test_a_hook_on_the_backward_of_a_traced_module_is_refused_by_name() -> None:
    compiled = lm_compiled(tiny_lm(), chunks=1)
    compiled(**lm_batch()).backward()
    compiled.layers[0].register_full_backward_hook(lambda _module, inputs, _outputs: (inputs[0] * 0.5,))
    with pytest.raises(errors.UnsupportedGraph, match="backward"):
        compiled(**lm_batch())

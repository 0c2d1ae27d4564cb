"""Updates that run on into the next forward on CUDA: nobody sees an old weight, however long they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chunkft_fx
from chunkft_fx.module.module import CompiledModule
from chunkft_fx.optim.states.pieces import PieceUpdates
from chunkft_fx.plan import pieces
from chunkft_fx.runtime import late_updates
from tests.support.late_updates import LateCases, is_running
from tests.support.waiting import waiting_in_host

pytestmark = pytest.mark.gpu

SLEEP = 500_000_000  # cycles, about 0.3 s


class TestLateUpdatesOnGpu(LateCases):
    device = "cuda"

    def slow(self) -> None:
        torch.cuda._sleep(SLEEP)

    def test_another_stream_sees_the_new_weights(self) -> None:
        late, plain = self.pair()
        for step in range(2):
            self.stepped(plain, step)
            self.stepped(late, step)
        assert is_running(late[0])
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = [p.detach().clone() for p in late[0].parameters()]
        stream.synchronize()
        for p, q in zip(found, plain[0].parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("ahead", [1, 4, 48])
def test_the_forward_begins_before_the_last_updates_end(monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    monkeypatch.setattr(pieces, "LARGEST_NBYTES", 1 << 26)
    monkeypatch.setattr(late_updates, "AHEAD", ahead)
    torch.manual_seed(0)
    width, layers = 4096, 12
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers))).bfloat16()
    with waiting_in_host():
        compiled = chunkft_fx.compile(model, "4GB", coverage="all", backend="eager", device="cuda")
        assert isinstance(compiled, CompiledModule)
        optimizer = chunkft_fx.AdamW(compiled, lr=1e-3, update="late")
        x = torch.randn(8, width, dtype=torch.bfloat16, device="cuda")
        for _ in range(2):
            compiled(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        # so small a model's updates could all be done before the first region asks: one behind its own takes long
        advance = PieceUpdates._advance

        def slowly(updates: PieceUpdates, step: Any, at: int) -> None:
            if at == len(step.order) // 3:
                torch.cuda._sleep(SLEEP)
            advance(updates, step, at)

        monkeypatch.setattr(PieceUpdates, "_advance", slowly)
        compiled(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        late, done = compiled._training.late, list[float]()
        wait = late.wait

        def noted(names: Any) -> None:
            wait(names)
            torch.cuda.current_stream().synchronize()
            done.append(sum(e.query() for e in late._events if e is not None) / late._count)

        monkeypatch.setattr(late, "wait", noted)
        with torch.enable_grad():
            loss: Tensor = compiled(x)
        assert loss.requires_grad
    assert done[0] < 0.5  # the first region ran before half of the updates were done
    assert done[-1] == 1.0

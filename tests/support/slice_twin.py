"""Torch's own optimizer over copies of the active slices, each a parameter of its own: what updates are held to."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from chunkft_fx.module.module import CompiledModule
from chunkft_fx.plan.chunk import Slice
from chunkft_fx.plan.state_spec import master_dtype
from tests.support.small_net import feed

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class SliceTwin:
    """Masters of slices, and torch's optimizer of each, which begin when the slice is active for the first time.

    With ``forgets`` they begin whenever the slice becomes active. Weights in float32 may differ by ``float32``.
    """

    def __init__(self, module: CompiledModule, make: Make, forgets: bool = False, float32: float = 2e-6) -> None:
        self._module, self._make, self._forgets, self._float32 = module, make, forgets, float32
        self._chunk = module.chunk
        self.known: dict[Slice, tuple[nn.Parameter, torch.optim.Optimizer]] = {}

    def step(self, optimizer: torch.optim.Optimizer, step: int, scale: float = 1.0) -> None:
        """Feed random gradients, and step torch's optimizer by them times ``scale``, then ``optimizer``."""
        module = self._module
        if self._forgets and module.chunk != self._chunk:
            self.known.clear()
        self._chunk = module.chunk
        feed(module, step)
        active = module.active_slices()
        for s in active:
            if s.slice not in self.known:
                master = nn.Parameter(s.weight().to(master_dtype(s.parameter), copy=True).contiguous())
                self.known[s.slice] = master, self._make([master])
            master, torchs = self.known[s.slice]
            assert s.grad is not None
            master.grad = s.grad.detach() * scale
            torchs.step()
        held = [s.grad for s in active if s.grad is not None]
        before = [g.clone() for g in held]
        optimizer.step()
        assert all(torch.equal(g, h) for g, h in zip(held, before, strict=True))
        for s in active:
            assert_same(s.weight(), self.known[s.slice][0].detach(), self._float32)


def assert_same(weight: Tensor, master: Tensor, float32: float) -> None:
    """A weight is its master, rounded; the last bits of a master depend on how its memory is laid out."""
    tolerances = {torch.float64: 1e-12, torch.float32: float32, torch.bfloat16: 2**-7, torch.float16: 2**-10}
    tolerance = tolerances[weight.dtype]
    torch.testing.assert_close(weight, master.to(weight.dtype), rtol=tolerance, atol=tolerance * 0.1)

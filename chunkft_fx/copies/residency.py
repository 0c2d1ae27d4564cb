"""Residency: says where each weight lives, and shows the model to its callers while some weights live in host memory.

A streamed weight stays in ``parameter.data``, in (pinned) host memory, where ``state_dict``, copies and pickles
find it. Only while the model runs does its parameter stand for a tensor on the compute device that has no storage:
what Dynamo guards on (device, shape, strides, dtype) is then the same in every call, and nothing can read it by
mistake. The session takes the weight's real tensor from here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from chunkft_fx.copies.tier import HostTier
from chunkft_fx.errors import OptionError


class Residency:
    """The weights of one model: those named in ``streamed`` are fetched for each use, the others are on ``device``."""

    def __init__(self, model: nn.Module, device: torch.device, tier: HostTier) -> None:
        self.device = device
        self.parameters = dict(model.named_parameters())
        self.streamed: frozenset[str] = frozenset()
        self.depth = 2
        self._tier = tier
        self._real: dict[str, Tensor] = {}
        self._ghosts: dict[str, Tensor] = {}
        self._nesting = 0

    def real(self, name: str) -> Tensor:
        """The tensor that holds a weight, also while the model runs."""
        return self.holder(name).detach()

    def holder(self, name: str) -> Tensor:
        """As `real`, without ``detach()``: this is called for every weight in every step, only to look at it."""
        return self._real.get(name, self.parameters[name])

    def away(self) -> frozenset[str]:
        """The weights that a program must fetch: the streamed ones, and any that someone moved off the device."""
        if self._nesting:
            return self.streamed.union(self._real)
        elsewhere = {n for n, p in self.parameters.items() if p.device != self.device}
        return self.streamed | elsewhere

    def rebind(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Let other parameters take the place of those of the same names, and put them where those were."""
        self.parameters = dict(parameters)
        self.settle(self.streamed, self.depth)

    def settle(self, streamed: Iterable[str], depth: int) -> None:
        """Put the weights where the plan wants them: these into host memory, all others onto the device."""
        self.streamed, self.depth = frozenset(streamed), depth
        for name, parameter in self.parameters.items():
            real = self._real.pop(name, parameter.data)
            wanted = self._tier.moved(real) if name in self.streamed else real.to(self.device)
            if self._nesting and name in self.streamed:
                self._real[name] = wanted
                wanted = self._ghost(name, wanted)
            if parameter.data_ptr() != wanted.data_ptr() or parameter.device != wanted.device:
                parameter.data = wanted
            del real, wanted
        self._ghosts = {n: g for n, g in self._ghosts.items() if n in self.streamed}

    @contextlib.contextmanager
    def presented(self) -> Iterator[None]:
        """While inside, every weight that has to be fetched looks as if it were on the device."""
        away = () if self._nesting else self.away()
        self._nesting += 1
        try:
            for name in away:
                parameter = self.parameters[name]
                self._real[name] = parameter.data
                parameter.data = self._ghost(name, parameter.data)
            yield
        finally:
            self._nesting -= 1
            if not self._nesting:
                for name, real in self._real.items():
                    self.parameters[name].data = real
                self._real.clear()

    def _ghost(self, name: str, like: Tensor) -> Tensor:
        ghost = self._ghosts.get(name)
        if ghost is None or (ghost.shape, ghost.stride(), ghost.dtype) != (like.shape, like.stride(), like.dtype):
            ghost = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=self.device)
            ghost.untyped_storage().resize_(0)
            self._ghosts[name] = ghost
        return ghost


def compute_device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """The device to run on, with its index; `OptionError` for one that cannot be used."""
    wanted = next(model.parameters()).device if device is None else torch.device(device)
    if wanted.type not in ("cpu", "cuda"):
        raise OptionError(f"device={str(wanted)!r} is not supported; use the CPU or a CUDA device")
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device={str(wanted)!r} was asked for, but torch sees no CUDA device here")
    if wanted.type == "cuda" and wanted.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return wanted

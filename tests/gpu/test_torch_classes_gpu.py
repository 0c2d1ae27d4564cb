"""Any torch class over slices on CUDA, where it takes its foreach functions, against the class itself there."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn

import chunkft_fx
from tests.support.slice_twin import SliceTwin
from tests.support.small_net import compiled, net

pytestmark = pytest.mark.gpu

CASES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.Adam, {"amsgrad": True, "maximize": True}),
    (torch.optim.Adam, {"lr": torch.tensor(0.01, dtype=torch.float64)}),  # the rates of a sweep are such numbers
    (torch.optim.AdamW, {"foreach": False}),
    (torch.optim.NAdam, {"weight_decay": 0.1}),
    (torch.optim.RAdam, {}),
    (torch.optim.Adamax, {}),
    (torch.optim.ASGD, {"t0": 2.0}),  # keeps its numbers on the device
    (torch.optim.Rprop, {}),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.Adadelta, {}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (torch.optim.Adafactor, {}),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [1, 5])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_slices_equal_the_class_on_each(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], chunks: int, dtype: torch.dtype
) -> None:
    module = compiled(net(dtype), chunks).cuda()
    optimizer = chunkft_fx.optimizer(module, kind, **copy.deepcopy(options))
    twin = SliceTwin(module, lambda p: kind(p, **copy.deepcopy(options)), float32=1e-5)
    for step in range(12):
        twin.step(optimizer, step)


def test_muon_and_a_rate_on_the_device() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(6))).bfloat16()
    cases: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [(torch.optim.Muon, {})]
    cases.append((torch.optim.Adam, {"lr": torch.tensor(0.01, device="cuda")}))
    for kind, options in cases:
        module = compiled(copy.deepcopy(model), 3).cuda()
        optimizer = chunkft_fx.optimizer(module, kind, **options)
        twin = SliceTwin(module, functools.partial(kind, **options))
        for step in range(6):
            twin.step(optimizer, step)

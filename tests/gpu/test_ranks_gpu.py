"""Two GPUs train what one does, through NCCL: losses and weights, with states in host memory and weights streamed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import get_context

import chunkft_fx
from tests.support.rank_runs import Case, losses_of, model_of

ONE, ALL = {"coverage": "one", "chunks": 3}, {"coverage": "all"}
CASES = {
    "one": Case(ONE),
    "one, clipped, accumulated": Case(ONE, {"max_grad_norm": 0.05}, micro_batches=3),
    "one, uneven": Case(ONE, rows=(2, 4)),
    "one, used by some": Case(ONE, uses=(False, True)),
    "all": Case(ALL),
    "all, clipped, accumulated": Case(ALL, {"max_grad_norm": 0.05}, micro_batches=3),
    "all, in the backward": Case(ALL, {"update": "backward"}),
    "all, in the backward, accumulated": Case(ALL, {"update": "backward"}, micro_batches=3),
}

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def _rank(rank: int, size: int, folder: str, answers: Any) -> None:
    torch.cuda.set_device(rank)
    if size > 1:
        where = f"file://{folder}/store"
        dist.init_process_group("cpu:gloo,cuda:nccl", init_method=where, rank=rank, world_size=size)
    try:
        answers.put(
            (rank, {name: _trained(case, rank, size) for name, case in CASES.items() if size > 1 or not case.uses})
        )
    except BaseException as error:
        answers.put((rank, error))
    if size > 1:
        dist.destroy_process_group()


def _trained(case: Case, rank: int, size: int) -> tuple[list[float], list[Any]]:
    options: dict[str, Any] = {"interval": 1} if case.options["coverage"] == "one" else {}
    model = model_of(seed=rank).cuda()
    compiled = chunkft_fx.compile(model, "1GB", backend="eager", **(options | case.options))
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-2, **case.optimizer)
    losses = losses_of(case, compiled, optimizer, range(8), rank, size)
    return losses, [p.detach().cpu().numpy() for p in compiled.parameters()]


def _run(size: int, folder: str) -> dict[int, Any]:
    context = get_context("spawn")
    answers = context.SimpleQueue()
    processes = [context.Process(target=_rank, args=(rank, size, folder, answers)) for rank in range(size)]
    for process in processes:
        process.start()
    found = dict(answers.get() for _ in range(size))
    for process in processes:
        process.join()
    for result in found.values():
        if isinstance(result, BaseException):
            raise result
    return found


def test_two_gpus_train_what_one_does(tmp_path: Any) -> None:
    alone, together = _run(1, str(tmp_path))[0], _run(2, str(tmp_path))
    for name, (losses, weights) in together[0].items():
        if name in alone:
            assert losses == pytest.approx(alone[name][0], rel=1e-9)
            assert max(abs(a - b).max() for a, b in zip(weights, alone[name][1], strict=True)) <= 1e-9
        others = together[1][name]
        assert losses == others[0]
        assert all((a == b).all() for a, b in zip(weights, others[1], strict=True))

"""Steps of several GPUs beside one, and beside FSDP2, with the same model, data and dtypes.

    torchrun --nproc-per-node 2 -m benchmarks.bench_ranks one --chunks 64 --out one.jsonl
    torchrun --nproc-per-node 2 -m benchmarks.bench_ranks all --out all.jsonl
    torchrun --nproc-per-node 2 -m benchmarks.bench_ranks fsdp --out fsdp.jsonl
    CUDA_VISIBLE_DEVICES=0 python -m benchmarks.bench_ranks one --chunks 64 --out one.jsonl

``one`` and ``all`` are this library's coverages, with float32 states in host memory (``--state-dtype``, ``--master``
for narrower ones); ``all`` updates in the backward. ``fsdp`` is torch's fully_shard over blocks and root, bf16 weights
with float32 masters sharded over ranks (MixedPrecisionPolicy), blocks recomputed, torch.optim.AdamW fused. Random
weights, a batch of ``--batch`` x ``--sequence`` tokens for each rank. Times are means over ``--steps`` steps behind the
first ones, on rank 0, tokens those of all ranks; a line of JSON a run goes to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import chunkft_fx
from benchmarks.shapes import SHAPES, batches, build

Step = Callable[[int], Tensor]


def ours(args: argparse.Namespace, model: nn.Module, data: list[Tensor]) -> tuple[Step, Any]:
    """A step of this library, and the compiled model."""
    options: dict[str, Any] = {"coverage": args.what}
    if args.what == "one":
        options |= {"chunks": args.chunks, "interval": 1}
    compiled = chunkft_fx.compile(model, args.budget, device="cuda", **options)
    update = {"update": "backward"} if args.what == "all" else {}
    states: dict[str, Any] = {"state_dtype": args.state_dtype, "master": args.master} | update
    optimizer = chunkft_fx.AdamW(compiled, lr=1e-5, weight_decay=0.0, **states)
    return stepping(compiled, optimizer, data), compiled


def fsdp(args: argparse.Namespace, model: Any, data: list[Tensor]) -> tuple[Step, Any]:
    """A step of FSDP2."""
    model = model.float()
    blocks = model.model.layers
    kinds = {type(block) for block in blocks}
    apply_activation_checkpointing(model, check_fn=lambda module: type(module) in kinds)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    for block in blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    return stepping(model, optimizer, data), None


def stepping(model: Any, optimizer: torch.optim.Optimizer, data: list[Tensor]) -> Step:
    """A training step, which returns its loss."""

    def step(i: int) -> Tensor:
        ids = data[i % len(data)]
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def main() -> None:
    """Run one configuration on this rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("one", "all", "fsdp"))
    parser.add_argument("--shape", default="llama2-7b", choices=SHAPES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--budget", default="24GB")
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--state-dtype", default="float32")
    parser.add_argument("--master", default="float32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(local)
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", local))
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    model: Any = build(args.shape, "cuda", args.layers)
    data = batches(model.config.vocab_size, args.batch, args.sequence, "cuda", 4 * ranks)[rank::ranks]
    step, compiled = (fsdp if args.what == "fsdp" else ours)(args, model, data)
    begin = time.perf_counter()
    losses = [step(0).item()]
    first_s = time.perf_counter() - begin
    for i in range(1, args.warm):
        step(i)
    torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()
    begin = time.perf_counter()
    for i in range(args.steps):
        last = step(args.warm + i)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) / args.steps
    losses.append(last.item())
    reserved = torch.tensor([torch.cuda.max_memory_reserved()], device="cuda")
    if dist.is_initialized():
        dist.all_reduce(reserved, op=dist.ReduceOp.MAX)
    line = {
        "what": args.what, "shape": args.shape, "layers": args.layers, "ranks": ranks, "budget": args.budget,
        "batch": args.batch, "sequence": args.sequence, "ms": seconds * 1e3, "first_s": first_s,
        "tokens_per_s": ranks * args.batch * args.sequence / seconds, "reserved_gib": reserved.item() / 2**30,
        "losses": losses, "device": torch.cuda.get_device_name(), "states": [args.state_dtype, args.master],
    }  # fmt: skip
    if compiled is not None:
        plan = compiled.plan
        line |= {
            "chunks": len(plan.chunks), "streamed": len(plan.streamed), "predicted_ms": plan.predicted_step_us / 1e3,
            "predicted_gib": plan.predicted_peak_bytes / 2**30, "host_terms": plan.host_terms,
            "link": compiled._training.options.link.nbytes_per_s,
        }  # fmt: skip
    if rank == 0:
        print(json.dumps(line), flush=True)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

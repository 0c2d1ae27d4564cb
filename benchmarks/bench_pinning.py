"""What pinning host memory costs, and how fast it is copied from; the allocator's settings come from the environment.

    python -m benchmarks.bench_pinning
    PYTORCH_CUDA_ALLOC_CONF=pinned_use_cuda_host_register:True,pinned_num_register_threads:8 \\
        python -m benchmarks.bench_pinning
"""

from __future__ import annotations

import time

import torch
import typer

GIB = 2**30


def main(gib: int = 4) -> None:
    """Pin host memory a GiB at a time, copy all of it to the GPU, and print the rates."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this measurement needs a CUDA GPU")
    target = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    begin = time.perf_counter()
    pinned = [torch.zeros(GIB, dtype=torch.uint8, pin_memory=True) for _ in range(gib)]
    pinning = time.perf_counter() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for source in pinned:
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    copying = time.perf_counter() - begin
    rates = f"{pinning / gib:.3f} s to pin a GiB, {gib / copying:.1f} GiB/s to the device"
    print(f"{torch.cuda.get_device_name()}: {rates}")


if __name__ == "__main__":
    typer.run(main)

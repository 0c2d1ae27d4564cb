"""What pinning host memory costs, and how fast it is copied: that of torch's allocator beside this library's own.

    python -m benchmarks.bench_pinning
    PYTORCH_CUDA_ALLOC_CONF=pinned_use_cuda_host_register:True,pinned_num_register_threads:8 \\
        python -m benchmarks.bench_pinning
"""

from __future__ import annotations

import time
from functools import partial

import torch
import typer
from torch import Tensor

from chunkft_fx.copies.host_memory import pinned_zeros

GIB = 2**30
PIECE = 32 * 2**20


def main(gib: int = 8) -> None:
    """Pin host memory a GiB at a time, copy it in pieces of 32 MiB, and print the rates."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this measurement needs a CUDA GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    for name, take in (
        ("torch", partial(torch.zeros, GIB, dtype=torch.uint8, pin_memory=True)),
        ("chunkft_fx", partial(pinned_zeros, GIB, device)),
    ):
        begin = time.perf_counter()
        pinned = [take() for _ in range(gib)]
        pinning = time.perf_counter() - begin
        pieces = [p for slab in pinned for p in slab.split(PIECE)]
        one, (there, back) = copied(pieces, []), (copied(pieces, pieces[::-1]))
        print(
            f"{torch.cuda.get_device_name()}, {name}: {pinning / gib:.3f} s to pin a GiB; to the device alone "
            f"{one[0]:.1f} GiB/s, both ways at once {there:.1f} to it and {back:.1f} from it"
        )


def copied(sources: list[Tensor], targets: list[Tensor]) -> tuple[float, float]:
    """GiB/s of copies to the device, and of copies from it beside them (0 if there are none)."""
    rates = []
    buffers = [torch.empty(PIECE, dtype=torch.uint8, device="cuda") for _ in range(2)]
    torch.cuda.synchronize()
    for tensors, buffer, is_to in ((sources, buffers[0], True), (targets, buffers[1], False)):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(torch.cuda.Stream()):
            first.record()
            for t in tensors:
                (buffer if is_to else t).copy_(t if is_to else buffer, non_blocking=True)
            last.record()
        rates.append((len(tensors) * PIECE / GIB, first, last))
    torch.cuda.synchronize()
    there, back = (size / max(first.elapsed_time(last), 1e-6) * 1e3 for size, first, last in rates)
    return there, back


if __name__ == "__main__":
    typer.run(main)

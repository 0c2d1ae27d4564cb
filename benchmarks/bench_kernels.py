"""How fast the AdamW kernel and torch's copy engine move bytes, on device and pinned host memory.

    python -m benchmarks.bench_kernels --sweep --out kernels.json

bf16 weights, float32 gradients and states, 200M elements in 12 slices unless said otherwise. AdamW's kernel moves 32
bytes an element on the device; with states on the host 12 of them come over the link and 12 go back at the same time.
Times are medians of CUDA events around single launches, the table's copy included; ``call`` is the time until the call
returns. ``--sweep`` tries tiles, warps and numbers of programs. Needs one CUDA GPU and 10 GB of host memory.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from chunkft_fx.kernels.adamw.fused import SliceUpdate, launch_adamw
from chunkft_fx.kernels.launch import LaunchOptions

GIB = 2**30
SLICES = 12
MANY_SLICES = 1000
# Gradient read, weight, master and both moments read and written; then states only, one way.
DEVICE_NBYTES = 4 + 2 * (2 + 4 + 4 + 4)
LINK_NBYTES = 4 + 4 + 4
# torch's AdamW on float32 weights: gradient read, weight and both moments read and written.
FLOAT32_NBYTES = 4 + 2 * (4 + 4 + 4)
OPTIONS: dict[str, Any] = {"lr": 1e-5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}

TILES = (512, 1024, 2048, 4096)
WARPS = (4, 8, 16)
PER_MULTIPROCESSOR = (2, 4, 8, 16)
ON_HOST = (16, 32, 64, 96, 132, 264)


@dataclass(frozen=True)
class Row:
    """One measurement: median milliseconds on the device, microseconds of the call, bytes moved each way at once.

    ``ways`` is how many directions the bytes move in at the same time; on the device all count as one.
    """

    name: str
    median_ms: float
    call_us: float
    nbytes: int
    ways: int
    on_link: bool
    launch: LaunchOptions | None = None

    @property
    def rate(self) -> str:
        """Bytes moved in a second, in TB/s on the device and GiB/s over the link."""
        bytes_per_s = self.nbytes / (self.median_ms * 1e-3)
        if not self.on_link:
            return f"{bytes_per_s / 1e12:.2f} TB/s"
        return f"{bytes_per_s / GIB:.1f} GiB/s{' each way' if self.ways == 2 else ''}"


def measure(run: Callable[[], None], steps: int) -> tuple[float, float]:
    """Medians of milliseconds on the device and microseconds until the call returns, after two runs to warm up."""
    device, calls = [], []
    for step in range(steps + 2):
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        called = time.perf_counter()
        run()
        elapsed = time.perf_counter() - called
        end.record()
        end.synchronize()
        if step >= 2:
            device.append(begin.elapsed_time(end))
            calls.append(elapsed * 1e6)
    return sorted(device)[steps // 2], sorted(calls)[steps // 2]


def slices(numel: int, count: int, host: bool, dim: int = 0) -> list[SliceUpdate]:
    """The first halves of ``count`` parameters along ``dim``, ``numel`` elements in all; in ``dim`` 1 they are 4096."""
    memory: dict[str, Any] = {"pin_memory": True} if host else {"device": "cuda"}
    length = 4096 if dim else max(1, numel // count // 64)
    other = max(1, numel // count // length)
    found = []
    for _ in range(count):
        shape = (other, 2 * length) if dim else (2 * length, other)
        weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16).narrow(dim, 0, length)
        gradient = torch.randn(weight.shape, device="cuda").movedim(dim, 0)
        weight = weight.movedim(dim, 0)
        master = torch.empty(weight.shape, dtype=torch.float32, **memory).copy_(weight)
        average, square = (torch.zeros(weight.shape, dtype=torch.float32, **memory) for _ in range(2))
        found.append(SliceUpdate(weight, gradient, master, average, square, 1))
    return found


def adamw_row(
    name: str, updates: Sequence[SliceUpdate], host: bool, steps: int, launch: LaunchOptions | None = None
) -> Row:
    """Time the fused AdamW on these slices, whose states are on the device or on the host (``host``)."""
    numel = sum(u.weight.numel() for u in updates)
    options = launch or LaunchOptions()
    times = measure(partial(launch_adamw, updates, **OPTIONS, launch=options), steps)
    return Row(name, *times, (LINK_NBYTES if host else DEVICE_NBYTES) * numel, 2 if host else 1, host, launch)


def torch_adamw_row(numel: int, steps: int) -> Row:
    """Time torch's fused AdamW on ``numel`` float32 elements on the device."""
    params = [torch.nn.Parameter(torch.randn(numel // SLICES, device="cuda")) for _ in range(SLICES)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW(params, lr=1e-5, fused=True)

    def run() -> None:
        optimizer.step()

    times = measure(run, steps)
    return Row("torch fused AdamW, float32 on the device", *times, FLOAT32_NBYTES * numel // SLICES * SLICES, 1, False)


@dataclass(frozen=True)
class Buffers:
    """Float32 tensors for both directions: to the device, and back from other ones."""

    host: list[Tensor]
    device: list[Tensor]
    host_back: list[Tensor]
    device_back: list[Tensor]

    @classmethod
    def make(cls, numel: int, count: int) -> Buffers:
        """Buffers of ``numel`` elements in all, in ``count`` tensors each; those on the host are pinned."""
        size = numel // count
        host, back = ([torch.zeros(size, pin_memory=True) for _ in range(count)] for _ in range(2))
        device, device_back = ([torch.zeros(size, device="cuda") for _ in range(count)] for _ in range(2))
        return cls(host, device, back, device_back)

    @property
    def nbytes(self) -> int:
        """Bytes that are copied in one direction."""
        return sum(t.nbytes for t in self.host)

    def directions(self) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
        """Sources and destinations; for both ways alternating, so that each is under way all the time."""
        sources = [t for pair in zip(self.host, self.device_back, strict=True) for t in pair]
        destinations = [t for pair in zip(self.device, self.host_back, strict=True) for t in pair]
        return {
            "to the device": (self.host, self.device),
            "to the host": (self.device_back, self.host_back),
            "both ways": (sources, destinations),
        }


def engine_row(name: str, direction: str, buffers: Buffers, steps: int) -> Row:
    """Copies of torch's copy engine; both ways at once take a stream each."""
    ways = buffers.directions()
    chosen = [ways["to the device"], ways["to the host"]] if direction == "both ways" else [ways[direction]]
    streams = [torch.cuda.Stream() for _ in chosen]

    def run() -> None:
        current = torch.cuda.current_stream()
        for stream, (sources, destinations) in zip(streams, chosen, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for source, destination in zip(sources, destinations, strict=True):
                    destination.copy_(source, non_blocking=True)
        for stream in streams:
            current.wait_stream(stream)

    return Row(name, *measure(run, steps), buffers.nbytes, len(chosen), True)


def compare(numel: int, steps: int) -> Iterator[Row]:
    """AdamW's kernel at its default settings, torch's AdamW and torch's copies, a row at a time."""
    for host, place in ((False, "on the device"), (True, "states on the host")):
        yield adamw_row(f"AdamW, rows, {place}", slices(numel, SLICES, host), host, steps)
        yield adamw_row(f"AdamW, columns, {place}", slices(numel, SLICES, host, dim=1), host, steps)
        yield adamw_row(f"AdamW, {MANY_SLICES} slices, {place}", slices(numel, MANY_SLICES, host), host, steps)
    yield torch_adamw_row(numel, steps)
    for count in (SLICES, MANY_SLICES):
        buffers = Buffers.make(numel, count)
        for direction in buffers.directions():
            yield engine_row(f"copy engine, {count} tensors {direction}", direction, buffers, steps)


def settings(counts: Sequence[int], field: str) -> Iterator[LaunchOptions]:
    """Launch options with four elements a thread at least, and ``field`` of these values."""
    for tile, warps, count in itertools.product(TILES, WARPS, counts):
        if tile >= 4 * 32 * warps:
            yield replace(LaunchOptions(tile=tile, num_warps=warps), **{field: count})


def sweep(numel: int, steps: int) -> Iterator[Row]:
    """AdamW's kernel at every setting; the fastest first."""
    for host, place in ((False, "on the device"), (True, "states on the host")):
        updates = slices(numel, SLICES, host)
        choices = settings(ON_HOST, "on_host") if host else settings(PER_MULTIPROCESSOR, "per_multiprocessor")
        rows = [adamw_row(f"AdamW, rows, {place}", updates, host, steps, launch) for launch in choices]
        yield from sorted(rows, key=lambda r: r.median_ms)


def table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown; times on the device in milliseconds, of the call in microseconds."""
    lines = ["| what | median | rate | call | tile, warps, programs |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {r.name} | {r.median_ms:.2f} ms | {r.rate} | {r.call_us:.0f} us | {setting(r)} |" for r in rows]
    return "\n".join(lines)


def setting(row: Row) -> str:
    """A row's launch options as text; empty for torch's own kernels."""
    if row.launch is None:
        return ""
    o = row.launch
    programs = f"{o.on_host}" if row.on_link else f"{o.per_multiprocessor} a multiprocessor"
    return f"{o.tile}, {o.num_warps}, {programs}"


def main(
    numel: Annotated[int, typer.Option(help="elements in all")] = 200_000_000,
    steps: Annotated[int, typer.Option(help="launches of which the median counts")] = 10,
    sweep_settings: Annotated[
        bool, typer.Option("--sweep", help="try launch options, at a quarter of --numel")
    ] = False,
    shown: Annotated[int, typer.Option(help="settings of each kernel to print, the fastest first")] = 5,
    out: Annotated[Path | None, typer.Option(help="write all rows here, as JSON")] = None,
) -> None:
    """Measure the AdamW kernel and torch's copy engine on one CUDA GPU."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this measurement needs a CUDA GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {numel:,} elements")
    rows = list(compare(numel, steps))
    print(table(rows))
    tried = list(sweep(numel // 4, steps)) if sweep_settings else []
    for _, group in itertools.groupby(tried, key=lambda r: r.name):
        print(table(list(itertools.islice(group, shown))))
    if out is not None:
        out.write_text(json.dumps([asdict(r) for r in rows + tried], indent=1))


if __name__ == "__main__":
    typer.run(main)

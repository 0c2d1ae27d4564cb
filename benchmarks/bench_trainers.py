"""How trainers that people have do with a compiled model: TRL's SFT beside itself, and Trainer's steps beside a loop's.

    python -m benchmarks.bench_trainers sft --model MODEL --data chat.npz
    python -m benchmarks.bench_trainers step --shape llama2-7b --batch 8 --sequence 1024 --budget 24GB

``sft`` trains a model on chats with the loss on answers alone (``python -m benchmarks.quality.documentation --chat``
makes the text), by TRL as it is and by TRL with `chunkft_fx.attach` under a share of the bytes that torch reserved for
the former, and prints their losses. ``step`` times Trainer with a compiled model, then a plain loop with the same model
and optimizer, over the same chunks.
"""

from __future__ import annotations

import gc
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import chunkft_fx
from benchmarks.quality.data import IGNORED, read_text
from benchmarks.shapes import SHAPES, batches, build
from chunkft_fx.bytes import format_bytes
from chunkft_fx.tools.load import load_model, load_tokenizer

app = typer.Typer(add_completion=False)


@app.command()
def sft(
    model: Annotated[str, typer.Option(help="a .gguf file, or a folder with a config and weights")],
    data: Annotated[Path, typer.Option(help="chats as an .npz file")],
    steps: Annotated[int, typer.Option(help="optimizer steps")] = 100,
    batch: Annotated[int, typer.Option(help="sequences of 512 tokens in a step")] = 16,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 3e-4,
    share: Annotated[float, typer.Option(help="the budget, of the bytes that plain TRL reserves")] = 0.6,
    budget: Annotated[int | None, typer.Option(help="the budget in bytes; plain TRL is then left out")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
) -> None:
    """Print losses and bytes of SFT with and without this library, each run in a process of its own."""
    how = (model, data, steps, batch, lr, device)
    if budget is None:
        budget = int(share * _apart(_sft, *how, torch.float32, None)) or 10**11
    for dtype in (torch.float32, torch.bfloat16):
        _apart(_sft, *how, dtype, budget)


def _sft(
    model: str, data: Path, steps: int, batch: int, lr: float, device: str, dtype: torch.dtype, budget: int | None
) -> int:
    """Train, attached if there is a budget; returns the bytes that were reserved."""
    from trl import SFTTrainer

    args, plain = _sft_arguments(steps, batch, lr, device), load_model(model, dtype, torch.device(device))
    rows = chats(data, batch * steps)
    trainer = SFTTrainer(plain, args, train_dataset=rows, processing_class=load_tokenizer(model))
    if budget is not None:
        compiled = chunkft_fx.attach(trainer, budget)
    begin = time.perf_counter()
    trainer.train()
    seconds, reserved = time.perf_counter() - begin, _reserved()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    name = "TRL" if budget is None else "attached"
    print(f"{name}, {dtype}: {format_bytes(reserved)} reserved, {seconds:.0f} s, losses {losses}", flush=True)
    if budget is not None:
        print(f"budget {format_bytes(budget)}, {len(compiled.plan.chunks)} chunks of a plan", flush=True)
    return reserved


@app.command()
def step(
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "llama2-7b",
    layers: Annotated[int | None, typer.Option(help="blocks, if not as many as the shape has")] = None,
    batch: Annotated[int, typer.Option(help="sequences in a step")] = 8,
    sequence: Annotated[int, typer.Option(help="tokens in a sequence")] = 1024,
    budget: Annotated[str, typer.Option(help="of compile")] = "24GB",
    chunks: Annotated[int | None, typer.Option(help="a chunk a step, of so many; all parameters if not given")] = None,
    steps: Annotated[int, typer.Option(help="timed steps, rounded up to whole sweeps")] = 20,
) -> None:
    """Print milliseconds of a step of Trainer and of a loop."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    plain = build(shape, "cpu", layers)
    ids = torch.cat(batches(SHAPES[shape](None)[1].vocab_size, batch, sequence, "cpu"))
    sweep = chunks or 1
    timed = -(-steps // sweep) * sweep
    warm = sweep + timed  # programs of all chunks are compiled in the first sweep
    clock = Clock(warm, timed)
    drawn = list(ids.repeat(warm + timed, 1)[: (warm + timed) * batch].numpy())  # one epoch
    rows = Dataset.from_dict({"input_ids": drawn, "labels": drawn}).with_format("torch")
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=warm + timed, per_device_train_batch_size=batch, max_grad_norm=0,
        logging_steps=10, report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=1e-5,
    )  # fmt: skip
    trainer = Trainer(plain, args, train_dataset=rows, callbacks=[clock.callback()])
    how: Any = {"coverage": "all"} if chunks is None else {"chunks": chunks, "interval": 1}
    compiled = chunkft_fx.attach(trainer, budget, **how)
    trainer.train()
    fed = [ids[i : i + batch].cuda() for i in range(0, len(ids), batch)]
    loop = Clock(sweep, timed)
    for i in range(sweep + timed):
        compiled(input_ids=fed[i % len(fed)], labels=fed[i % len(fed)]).loss.backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        loop.count(i + 1)
    for name, timer in (("Trainer", clock), ("a loop", loop)):
        print(f"{shape}, {batch} x {sequence}, {budget}, {how}: {name} {timer.found_ms:.1f} ms a step")
    print(f"{format_bytes(_reserved())} reserved", flush=True)


class Clock:
    """Times ``timed`` steps behind ``warm`` others; ``found_ms`` are milliseconds of a step.

    Garbage is collected before: what the compiler leaves takes Python's collector a second, once, and it does not
    matter to a training when.
    """

    def __init__(self, warm: int, timed: int) -> None:
        self._warm, self._timed, self._begin, self.found_ms = warm, timed, 0.0, 0.0

    def count(self, steps: int) -> None:
        """Take note of the steps done so far."""
        if steps == self._warm:
            torch.cuda.synchronize()
            gc.collect()
            self._begin = time.perf_counter()
        if steps == self._warm + self._timed:
            torch.cuda.synchronize()
            self.found_ms = (time.perf_counter() - self._begin) / self._timed * 1e3

    def callback(self) -> Any:
        """What counts the steps of a Trainer."""
        from transformers import TrainerCallback

        clock = self

        class Counter(TrainerCallback):  # type: ignore[misc, unused-ignore]
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                clock.count(state.global_step)

        return Counter()


def chats(path: Path, count: int) -> Any:
    """The first sequences of a text, tokenized, with masks of what is learned."""
    from datasets import Dataset

    found = read_text(path, 512, 0).training
    ids, masks = found.ids[:count].numpy(), (found.labels[:count] != IGNORED).numpy().astype(np.int64)
    return Dataset.from_dict({"input_ids": list(ids), "completion_mask": list(masks)})


def _sft_arguments(steps: int, batch: int, lr: float, device: str) -> Any:
    from trl import SFTConfig

    return SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=batch, learning_rate=lr,
        lr_scheduler_type="cosine", warmup_steps=max(1, steps // 20), logging_steps=max(1, steps // 10), report_to=[],
        save_strategy="no", disable_tqdm=True, bf16=False, gradient_checkpointing=False, completion_only_loss=True,
        max_length=512, use_cpu=device == "cpu", seed=0,
    )  # fmt: skip


def _apart(run: Callable[..., int], *given: Any) -> int:
    """Run in a process that ends with it, whose memory nothing else has used."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, *given).result()


def _reserved() -> int:
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0


if __name__ == "__main__":
    app()

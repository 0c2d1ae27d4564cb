"""How trainers that people have do with a compiled model: TRL's SFT beside itself, and Trainer's steps beside a loop's.

    python -m benchmarks.bench_trainers sft --model MODEL --data chat.npz
    python -m benchmarks.bench_trainers step --shape llama2-7b --batch 8 --sequence 1024 --budget 24GB

``sft`` trains a model on chats with the loss on answers alone (``python -m benchmarks.quality.documentation --chat``
makes the text), by TRL as it is and by TRL with `chunkft_fx.attach` under a share of the bytes that torch reserved for
the former, and prints their losses. ``step`` times Trainer with a compiled model, then a plain loop with the same model
and optimizer.
"""

from __future__ import annotations

import gc
import tempfile
import time
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
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
) -> None:
    """Print losses and bytes of SFT with and without this library."""
    from trl import SFTTrainer

    rows = chats(data, batch * steps)
    budget = 10**11

    def trainer(dtype: torch.dtype) -> Any:
        _forget()
        args = _sft_arguments(steps, batch, lr, device)
        plain = load_model(model, dtype, torch.device(device))
        return SFTTrainer(plain, args, train_dataset=rows, processing_class=load_tokenizer(model))

    for name, dtype in (("TRL", torch.float32), ("attached", torch.float32), ("attached", torch.bfloat16)):
        made = trainer(dtype)
        if name == "attached":
            compiled = chunkft_fx.attach(made, budget)
        begin = time.perf_counter()
        made.train()
        seconds, reserved = time.perf_counter() - begin, _reserved()
        losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
        print(f"{name}, {dtype}: {format_bytes(reserved)} reserved, {seconds:.0f} s, losses {losses}", flush=True)
        if name == "attached":
            print(f"budget {format_bytes(budget)}, {len(compiled.plan.chunks)} chunks of a plan", flush=True)
            del compiled
        elif reserved:
            budget = int(share * reserved)
        del made


@app.command()
def step(
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "llama2-7b",
    batch: Annotated[int, typer.Option(help="sequences in a step")] = 8,
    sequence: Annotated[int, typer.Option(help="tokens in a sequence")] = 1024,
    budget: Annotated[str, typer.Option(help="of compile")] = "24GB",
    chunks: Annotated[int | None, typer.Option(help="a chunk a step, of so many; all parameters if not given")] = None,
    steps: Annotated[int, typer.Option(help="timed steps, behind as many to warm up and all chunks")] = 20,
) -> None:
    """Print milliseconds of a step of Trainer and of a loop."""
    from datasets import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    plain = build(shape, "cpu")
    ids = torch.cat(batches(SHAPES[shape](None)[1].vocab_size, batch, sequence, "cpu"))
    warm, marks = steps + (chunks or 0), []  # programs of all chunks are compiled in the first sweep

    class Clock(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in (warm, warm + steps):
                torch.cuda.synchronize()
                marks.append(time.perf_counter())

    rows = Dataset.from_dict({"input_ids": list(ids.numpy()), "labels": list(ids.numpy())}).with_format("torch")
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=warm + steps, per_device_train_batch_size=batch, max_grad_norm=0,
        logging_steps=10, report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=1e-5,
    )  # fmt: skip
    trainer = Trainer(plain, args, train_dataset=rows, callbacks=[Clock()])
    how: Any = {"coverage": "all"} if chunks is None else {"chunks": chunks, "interval": 1}
    compiled = chunkft_fx.attach(trainer, budget, **how)
    trainer.train()
    fed = [ids[i : i + batch].cuda() for i in range(0, len(ids), batch)]
    times = []
    for i in range(warm + steps + 1):
        if i in (warm, warm + steps):
            torch.cuda.synchronize()
            times.append(time.perf_counter())
        compiled(input_ids=fed[i % len(fed)], labels=fed[i % len(fed)]).loss.backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
    for name, (begin, end) in (("Trainer", marks), ("a loop", times)):
        print(f"{shape}, {batch} x {sequence}, {budget}, {how}: {name} {(end - begin) / steps * 1e3:.1f} ms a step")
    print(f"{format_bytes(_reserved())} reserved", flush=True)


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


def _forget() -> None:
    """Give memory back, and let the next trainer use all of the device until it has a budget of its own."""
    gc.collect()  # trainers and their callbacks hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.reset_peak_memory_stats()


def _reserved() -> int:
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0


if __name__ == "__main__":
    app()

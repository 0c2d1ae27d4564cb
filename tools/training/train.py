"""``chunkft train``: fine-tune all parameters of a causal language model on text, inside a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

import chunkft_fx
from chunkft_fx.bytes import format_bytes
from chunkft_fx.errors import OptionError
from chunkft_fx.tools.console import progress, quiet, run_command
from chunkft_fx.tools.load import check_config, load_config, load_model, load_tokenizer, pick_device, pick_dtype
from chunkft_fx.tools.training import signals
from chunkft_fx.tools.training.checkpoint import require_checkpoint
from chunkft_fx.tools.training.data import Batches, pack, read_documents
from chunkft_fx.tools.training.folder import claimed, save_model
from chunkft_fx.tools.training.loop import check_schedule, train
from chunkft_fx.tools.training.options import (
    TrainOptions,
    at_least,
    check_compile_options,
    chunk_count,
    json_object,
    turn_steps,
)


def command(
    model: Annotated[str, typer.Argument(help="A folder, a name on the Hugging Face hub, or a .gguf file.")],
    data: Annotated[Path, typer.Argument(help="A text file, or a .jsonl file with a text or chat on each line.")],
    budget: Annotated[str, typer.Option(help='Device memory to stay within, such as "24GB" or "24GiB".')],
    out: Annotated[Path, typer.Option(help="Folder for the trained model, its tokenizer and checkpoints.")],
    chunks: Annotated[str, typer.Option(help='A number, or "auto": the fewest that fit the budget.')] = "auto",
    coverage: Annotated[
        str,
        typer.Option(help="What a step trains: one (chunk after another), all (parameters in every step) or auto."),
    ] = "auto",
    update: Annotated[
        str,
        typer.Option(
            help="When weights change: step; with coverage all also late (from it on) or backward (no clipping)."
        ),
    ] = "step",
    master: Annotated[
        str, typer.Option(help="Masters of bfloat16 weights: float32, or the remainder that the weights lack.")
    ] = "float32",
    state_dtype: Annotated[str, typer.Option(help="AdamW's moments: float32, bfloat16 or 8bit.")] = "float32",
    order: Annotated[str, typer.Option(help="ascending, descending or random.")] = "ascending",
    interval: Annotated[
        str, typer.Option(help="Optimizer steps on each chunk at a turn; auto: 40 or more in a sweep.")
    ] = "auto",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    seq_len: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences in a batch.")] = 1,
    accumulate: Annotated[int, typer.Option(help="Batches whose gradients add up to one optimizer step.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-5,
    schedule: Annotated[str, typer.Option(help="A schedule of transformers.get_scheduler.")] = "cosine",
    schedule_options: Annotated[str, typer.Option(help="The schedule's own arguments, as a JSON object.")] = "{}",
    warmup: Annotated[int, typer.Option(help="Optimizer steps in which the learning rate rises.")] = 0,
    weight_decay: Annotated[float, typer.Option(help="Decoupled weight decay.")] = 0.01,
    max_grad_norm: Annotated[float, typer.Option(help="Largest gradient norm of a chunk; 0 does not clip.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of data order, chunk order and dropout.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    backend: Annotated[
        str, typer.Option(help="inductor compiles the graphs, eager runs them as they are.")
    ] = "inductor",
    field: Annotated[str, typer.Option(help="The field of a jsonl line that holds the text.")] = "text",
    save_every: Annotated[int, typer.Option(help="Optimizer steps between checkpoints; 0 writes none.")] = 0,
    keep: Annotated[int, typer.Option(help="How many of the last checkpoints stay.")] = 2,
    resume: Annotated[Path | None, typer.Option(help="The --out folder of a run to continue.")] = None,
) -> None:
    """Fine-tune all parameters of MODEL on DATA and save it in the folder given by --out."""
    quiet()
    where = pick_device(device)
    options = TrainOptions(
        steps, batch_size, accumulate, lr, schedule, json_object(schedule_options), warmup, weight_decay,
        max_grad_norm or None, seed, save_every, update, master, state_dtype,
    )  # fmt: skip
    kind, count, turn = pick_dtype(dtype, where), chunk_count(chunks), turn_steps(interval)
    check_compile_options(budget, order, turn, backend, coverage, count)
    if update != "step" and coverage == "one":
        raise OptionError(f"update={update} updates all parameters in every step; give --coverage all with it")
    at_least("keep", keep, 1)
    at_least("seq_len", seq_len, 2)  # a token is learnt from those before it
    check_schedule(options)
    if resume is not None:
        require_checkpoint(resume)
    with claimed(out, model):
        # the model comes last: it takes the longest, and a mistake in the text should not wait for it
        tokenizer, sequences = _prepare(model, data, field, seq_len, options)
        plain = load_model(model, kind, where)
        check_config(model, plain.config, seq_len, sequences, tokenizer)
        compiled = chunkft_fx.compile(
            plain, budget, chunks=count, coverage=coverage, order=order, interval=turn, backend=backend, seed=seed
        )
        print(f"{sequences.numel():,} tokens in {len(sequences):,} sequences; training on {where}")
        with signals.between_steps() as stop:
            with progress("training", steps) as on_step:
                report = train(
                    compiled,
                    sequences,
                    options,
                    on_step=on_step,
                    out=out,
                    resume=resume,
                    tokenizer=tokenizer,
                    keep=keep,
                    stop=stop,
                )
            if report.losses:
                print(compiled.plan)
            save_model(out, compiled, tokenizer)
    print(
        f"{report.tokens:,} tokens in {report.seconds:.0f} s, peak {format_bytes(report.peak_nbytes)}; saved in {out}"
    )


def _prepare(model: str, data: Path, field: str, seq_len: int, options: TrainOptions) -> tuple[Any, Tensor]:
    """The tokenizer and the sequences, with all that can be found wrong before the weights are read."""
    config = load_config(model)
    if config is not None:
        check_config(model, config, seq_len)
    tokenizer = load_tokenizer(model)
    sequences = pack(read_documents(data, tokenizer, field), tokenizer, seq_len)
    Batches(sequences, options.batch_size, options.seed)
    if config is not None:
        check_config(model, config, seq_len, sequences, tokenizer)
    return tokenizer, sequences


if __name__ == "__main__":
    run_command(command)

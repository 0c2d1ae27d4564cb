"""``chunkft train``: fine-tune all parameters of a model on text, inside a budget."""

from __future__ import annotations

import math
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import chunkft_fx
from chunkft_fx.errors import CheckpointMismatch, ChunkFTWarning, OptionError
from chunkft_fx.ranks.ranks import launched
from chunkft_fx.tools.changes.wanted import ModelChanges
from chunkft_fx.tools.console import quiet, run_command
from chunkft_fx.tools.data.store import Reading
from chunkft_fx.tools.data.templates import check_template
from chunkft_fx.tools.load import CONFIG, pick_device, pick_dtype
from chunkft_fx.tools.rates import parse_rates
from chunkft_fx.tools.report import log
from chunkft_fx.tools.setup.job import Job
from chunkft_fx.tools.setup.prepare import DataOptions
from chunkft_fx.tools.setup.settings import SUFFIX, read_settings
from chunkft_fx.tools.training.checkpoint import require_checkpoint
from chunkft_fx.tools.training.folder import claimed
from chunkft_fx.tools.training.loop import check_schedule
from chunkft_fx.tools.training.options import (
    TrainOptions,
    at_least,
    check_compile_options,
    check_update,
    chunk_count,
    json_object,
    turn_steps,
)

AUTO, NEVER = "auto", "never"
DATA, LEARN, MODEL, PLAN, KEEP = "Data", "Learning", "Model", "Memory and speed", "Scores, logs and checkpoints"


def _first(context: typer.Context, value: str | None) -> str | None:
    """The model, or the file of options that stands in its place."""
    if value is None or not value.endswith(SUFFIX):
        return value
    read_settings(context, value)
    named: str | None = context.lookup_default("model")
    return named


def _option(text: str, panel: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


def command(
    context: typer.Context,
    budget: Annotated[str, _option('Device memory to stay within, such as "24GB" or "24GiB".', PLAN)],
    out: Annotated[Path, _option("Folder for the trained model, its tokenizer and checkpoints.", KEEP)],
    model: Annotated[
        str | None,
        typer.Argument(
            help="A folder, a name on the Hugging Face hub, or a .gguf file; or a .toml file with options.",
            is_eager=True,
            callback=_first,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Argument(help="Files (.jsonl, .json, .parquet, .csv, text), folders of datasets, or names on the hub."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="A .toml file with options; flags win over it.", is_eager=True, callback=read_settings),
    ] = None,
    task: Annotated[str, _option("causal, masked or classification.", LEARN)] = "causal",
    field: Annotated[str, _option("The field of a record that holds plain text.", DATA)] = "text",
    label_field: Annotated[str, _option("The field that holds the label, for classification.", DATA)] = "label",
    columns: Annotated[
        str, _option('Other names of fields, as a JSON object: {"prompt": "question", "completion": "answer"}.', DATA)
    ] = "{}",
    system: Annotated[str, _option("What conversations begin with that have no system message.", DATA)] = "",
    last_turn: Annotated[bool, _option("Of a conversation learn the assistant's last turn alone.", DATA)] = False,
    train_on_prompts: Annotated[bool, _option("Learn prompts too, not replies alone.", DATA)] = False,
    chat_template: Annotated[
        str, _option("A file with a Jinja template, zephyr or chatml; the tokenizer's own if not given.", DATA)
    ] = "",
    packing: Annotated[bool, _option("Put several documents in a row, or pad a row for each.", DATA)] = True,
    shuffle: Annotated[bool, _option("Shuffle the rows in each epoch, or take them as they stand.", DATA)] = True,
    seq_len: Annotated[int, _option("Tokens in a row.", DATA)] = 512,
    eval: Annotated[list[str] | None, _option("Held-out data to score on; can be given several times.", KEEP)] = None,
    eval_split: Annotated[float, _option("The share of the data to hold out instead.", KEEP)] = 0.0,
    eval_every: Annotated[
        float, _option("Optimizer steps between scores, below 1 a share of all; 0: once an epoch.", KEEP)
    ] = 0,
    patience: Annotated[
        int, _option("End the run after so many scores in a row that are no better; 0 trains all steps.", KEEP)
    ] = 0,
    steps: Annotated[int | None, _option("Optimizer steps, in place of --epochs.", LEARN)] = None,
    epochs: Annotated[float | None, _option("Passes over the data; 1 if neither is given.", LEARN)] = None,
    batch_size: Annotated[int, _option("Rows in a batch.", LEARN)] = 1,
    accumulate: Annotated[int, _option("Batches whose gradients add up to one optimizer step.", LEARN)] = 1,
    optimizer: Annotated[
        str, _option("adamw, sgd, adafactor, or a class of torch optimizers such as torch.optim.NAdam.", LEARN)
    ] = "adamw",
    optimizer_options: Annotated[str, _option("The optimizer's own arguments, as a JSON object.", LEARN)] = "{}",
    lr: Annotated[float, _option("Peak learning rate.", LEARN)] = 1e-5,
    schedule: Annotated[str, _option("A schedule of transformers.get_scheduler.", LEARN)] = "cosine",
    schedule_options: Annotated[str, _option("The schedule's own arguments, as a JSON object.", LEARN)] = "{}",
    warmup: Annotated[
        float, _option("Optimizer steps in which the learning rate rises; below 1 a share of all.", LEARN)
    ] = 0,
    weight_decay: Annotated[float, _option("Decoupled weight decay.", LEARN)] = 0.01,
    max_grad_norm: Annotated[float, _option("Largest gradient norm of a chunk; 0 does not clip.", LEARN)] = 1.0,
    label_smoothing: Annotated[
        float, _option("The share of each target that all tokens have alike, such as 0.1.", LEARN)
    ] = 0.0,
    neftune_noise_alpha: Annotated[
        float, _option("Noise on the embeddings while training, such as 5; 0 adds none.", LEARN)
    ] = 0.0,
    freeze: Annotated[
        list[str] | None,
        _option("Parameters to leave as they are, such as embed_tokens or layers.[0-7]; several times.", MODEL),
    ] = None,
    train_only: Annotated[
        list[str] | None, _option("Parameters to train, all others stay; can be given several times.", MODEL)
    ] = None,
    add_tokens: Annotated[
        list[str] | None, _option("A token to add to the tokenizer and the embeddings; several times.", MODEL)
    ] = None,
    add_special_tokens: Annotated[
        list[str] | None, _option("The same, for tokens that are no text, such as <|call|>.", MODEL)
    ] = None,
    model_config: Annotated[
        str, _option("Changes to the model's config, as a JSON object; saved with it.", MODEL)
    ] = "{}",
    seed: Annotated[int, _option("Seed of data order, chunk order and dropout.", LEARN)] = 0,
    coverage: Annotated[
        str,
        _option("What a step trains: one (chunk after another), all (parameters in every step) or auto.", PLAN),
    ] = "auto",
    update: Annotated[
        str,
        _option("When weights change: step; with coverage all also late (from it on) or backward (no clipping).", PLAN),
    ] = "step",
    chunks: Annotated[str, _option('A number, or "auto": the fewest that fit the budget.', PLAN)] = "auto",
    order: Annotated[str, _option("ascending, descending or random.", PLAN)] = "ascending",
    interval: Annotated[
        str, _option("Optimizer steps on each chunk at a turn; auto: 40 or more in a sweep.", PLAN)
    ] = "auto",
    master: Annotated[
        str, _option("Masters of bfloat16 weights: float32, or the remainder that the weights lack.", PLAN)
    ] = "float32",
    state_dtype: Annotated[str, _option("AdamW's moments: float32, bfloat16 or 8bit.", PLAN)] = "float32",
    dtype: Annotated[str, _option("auto, float32 or bfloat16.", PLAN)] = "auto",
    device: Annotated[str, _option("auto, cpu or cuda.", PLAN)] = "auto",
    backend: Annotated[str, _option("inductor compiles the graphs, eager runs them as they are.", PLAN)] = "inductor",
    save_every: Annotated[
        float, _option("Optimizer steps between checkpoints, below 1 a share of all; 0 writes none.", KEEP)
    ] = 0,
    keep: Annotated[int, _option("How many of the last checkpoints stay.", KEEP)] = 2,
    resume: Annotated[
        str, _option("auto goes on from a checkpoint in --out, never does not, or the --out folder of a run.", KEEP)
    ] = AUTO,
    track: Annotated[
        list[str] | None,
        _option("tensorboard, wandb, mlflow, ..., beside log.jsonl; can be given several times.", KEEP),
    ] = None,
    dry_run: Annotated[bool, _option("Show the data, the plan, steps and hours, and train nothing.", KEEP)] = False,
    rates: Annotated[
        str,
        _option(
            'With --dry-run: plan for another machine, "matmul=165T,memory=1T,link=25G" operations a second.', KEEP
        ),
    ] = "",
) -> None:
    """Fine-tune all parameters of MODEL on DATA and save it in the folder given by --out."""
    quiet()
    if launched() > 1:
        raise OptionError(
            f"the launcher has started {launched()} processes, and chunkft train runs as one; start it without "
            "torchrun, or write a loop for several GPUs (docs/several-gpus.md)"
        )
    if model is None:
        raise OptionError('there is no model; give MODEL, or "model" in a .toml file')
    where = torch.device("cpu") if rates else pick_device(device)
    number = torch.bfloat16 if rates and dtype == "auto" else pick_dtype(dtype, where)
    changes = ModelChanges(
        tuple(freeze or ()), tuple(train_only or ()), tuple(add_tokens or ()), tuple(add_special_tokens or ()),
        neftune_noise_alpha, label_smoothing, json_object(model_config),
    )  # fmt: skip
    options = TrainOptions(
        max(1, math.ceil(warmup)) if steps is None else steps, batch_size, accumulate, lr, schedule,
        json_object(schedule_options), warmup if warmup % 1 else int(warmup), weight_decay, max_grad_norm or None,
        seed, save_every, update, master, state_dtype, optimizer, json_object(optimizer_options), task, eval_every,
        shuffle, patience, changes,
    )  # fmt: skip
    if epochs is not None and not (math.isfinite(epochs) and epochs > 0):
        raise OptionError(f"epochs is {epochs}; it must be a number above 0")
    for name, value in (("eval-every", eval_every), ("patience", patience)):
        if value and not eval and not eval_split:
            raise OptionError(f"{name} is {value:g}, but nothing is held out to score on; give --eval or --eval-split")
    count, turn = chunk_count(chunks), turn_steps(interval)
    check_compile_options(budget, order, turn, backend, coverage, count)
    at_least("keep", keep, 1)
    check_update(update, coverage, count, order, turn)
    at_least("seq_len", seq_len, 2)  # a token is learnt from those before it
    check_schedule(options)
    check_template(chat_template)
    log.check_trackers(track or [])
    known = parse_rates(rates, str(number).removeprefix("torch.")) if rates else None
    if rates and not dry_run:
        raise OptionError("--rates are of another machine, which cannot train here; give --dry-run with them")
    reading = Reading(
        seq_len, field, train_on_prompts, label_field if task == "classification" else "", json_object(columns), system,
        last_turn,
    )  # fmt: skip
    sources = data or context.lookup_default("data") or []
    chosen = DataOptions(tuple(sources), reading, packing, tuple(eval or ()), eval_split)
    compiling = partial(
        chunkft_fx.compile, budget=budget, chunks=count, coverage=coverage, order=order, interval=turn,
        backend=backend, seed=seed,
    )  # fmt: skip
    job = Job(model, chosen, options, (steps, epochs), number, where, chat_template, compiling)
    if dry_run:
        job.show(known)
        return
    folder = _resumed(resume, out)
    with claimed(out, model):
        if folder is None and (out / CONFIG).exists():
            told = f"--out {out} holds a model, which this run replaces when it ends"
            warnings.warn(told, ChunkFTWarning, stacklevel=2)
        job.run(out, folder, keep, track or [], {k: v for k, v in context.params.items() if v is not None})


def _resumed(resume: str, out: Path) -> Path | None:
    """The folder whose checkpoint a run goes on from."""
    if resume == NEVER:
        return None
    folder = out if resume == AUTO else Path(resume)
    try:
        require_checkpoint(folder)
    except CheckpointMismatch:
        if resume != AUTO:
            raise
        return None
    return folder


if __name__ == "__main__":
    run_command(command)

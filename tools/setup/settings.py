"""Reads the options of a command from a TOML file, in place of flags that were not given."""

from __future__ import annotations

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any

import typer

from chunkft_fx.errors import OptionError

SUFFIX = ".toml"
# What torchtune, transformers, LLaMA-Factory and axolotl call options of this name.
ELSEWHERE = {
    "lr": ("learning_rate",), "epochs": ("num_train_epochs", "num_epochs"), "steps": ("max_steps",),
    "batch_size": ("per_device_train_batch_size", "micro_batch_size"), "accumulate": ("gradient_accumulation_steps",),
    "out": ("output_dir",), "model": ("base_model", "model_name_or_path"), "data": ("dataset", "datasets"),
    "seq_len": ("cutoff_len", "sequence_len", "max_seq_len", "max_length"), "packing": ("sample_packing", "packed"),
    "schedule": ("lr_scheduler", "lr_scheduler_type"), "warmup": ("warmup_steps", "warmup_ratio"),
    "eval_split": ("val_set_size", "val_size"), "eval_every": ("eval_steps",), "save_every": ("save_steps",),
    "keep": ("save_total_limit",), "patience": ("early_stopping_patience",), "track": ("report_to",),
    "label_smoothing": ("label_smoothing_factor",), "optimizer": ("optim",), "max_grad_norm": ("clip_grad_norm",),
    "train_on_prompts": ("train_on_inputs", "train_on_prompt"), "dtype": ("bf16",), "last_turn": ("mask_history",),
}  # fmt: skip


def read_settings(context: typer.Context, file: str | None) -> str | None:
    """Have the flags of a command that are not given come from a file; for an eager parameter's callback.

    A key is a flag's name, with ``-`` or ``_``. Raises `OptionError` for a file that cannot be read, and for a key that
    the command does not have, with the nearest that it has.
    """
    if file is None or context.resilient_parsing:
        return file
    takes_many = {p.name: p.nargs == -1 or getattr(p, "multiple", False) for p in context.command.params if p.name}
    known = takes_many.keys() - {"config", "help"}
    found: dict[str, Any] = {}
    for key, value in _parsed(Path(file)).items():
        name = key.replace("-", "_")
        if name not in known:
            meant = [ours for ours, theirs in ELSEWHERE.items() if name in theirs and ours in known]
            near = meant or difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {shown(near[0])}?" if near else f"known are {', '.join(map(shown, sorted(known)))}"
            raise OptionError(f"{file} has the key {key}, which {context.info_name} does not have; {hint}")
        found[name] = _as_typed(file, key, value, bool(takes_many[name]))
    context.default_map = {**(context.default_map or {}), **found}
    return file


def shown(name: str) -> str:
    """A parameter's name as it stands on the command line."""
    return name.replace("_", "-")


def _parsed(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"the options in {file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"{file} is not TOML: {error}") from error


def _as_typed(file: str, key: str, value: Any, takes_many: bool) -> Any:
    """A value as it would be typed, so that a file and a command line are checked by the same code."""
    if takes_many:
        return [_as_typed(file, key, v, False) for v in (value if isinstance(value, list) else [value])]
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list):
        raise OptionError(f"{file}: {key} has a list, and takes one value")
    return str(value)

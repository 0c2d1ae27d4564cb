"""Defines what a model can be trained for: its class in transformers, what its calls take, and what is learned."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chunkft_fx.errors import DataError, OptionError
from chunkft_fx.tools.data.rows import IGNORED, Batch, Pieces, Rows

# The class of transformers that loads a model for each task.
CLASSES = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
}


def check_task(task: str) -> None:
    """Raise `OptionError` for a task that does not exist."""
    if task not in CLASSES:
        raise OptionError(f"task is {task}; it must be one of {', '.join(CLASSES)}")


def call_options(model: Any, task: str) -> dict[str, Any]:
    """What every training call of a model gets: no key-value cache, which a training step would keep for nothing."""
    takes = task == "causal" or "use_cache" in inspect.signature(type(model).forward).parameters
    return {"use_cache": False} if takes else {}


@dataclass
class Masked:
    """Rows of which some tokens are hidden and are what is learned, others at each position of a run."""

    rows: Rows
    tokenizer: Any
    seed: int

    def __post_init__(self) -> None:
        import transformers

        if self.tokenizer.mask_token is None:
            raise OptionError("task masked hides tokens behind a mask token, and this tokenizer has none")
        self.length = self.rows.length
        self._collator = transformers.DataCollatorForLanguageModeling(self.tokenizer)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Sequence[int], position: int) -> Batch:
        """The batch with 15% of its tokens to be learned, of which most are hidden, as BERT was trained."""
        batch = self.rows.batch(rows, position)
        self._collator.generator = torch.Generator().manual_seed(self.seed * 1_000_003 + position)
        fixed = torch.tensor(
            [
                self.tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
                for ids in batch["input_ids"].tolist()
            ]
        )
        labels = torch.full_like(batch["labels"], IGNORED)
        while bool((labels == IGNORED).all()):  # of short rows the draw may hide nothing
            ids, labels = self._collator.torch_mask_tokens(batch["input_ids"].clone(), fixed)
        return batch | {"input_ids": ids, "labels": labels}

    @property
    def digest(self) -> str:
        return self.rows.digest


def class_numbers(pieces: Pieces, config: Any) -> dict[str, int]:
    """The number of each label in the data: the config's own where it names them, else in order.

    Raises `DataError` for a label that a config with names does not have, and for numbers that are not from 0 on.
    """
    found = sorted(set(pieces.data.data.column("label").to_pylist()))
    named = dict(getattr(config, "label2id", None) or {})
    if named and not all(name.startswith("LABEL_") for name in named):
        if set(found) <= named.keys():
            return {name: named[name] for name in found}
        if all(name.isdecimal() and int(name) < len(named) for name in found):
            return {name: int(name) for name in found}
        raise DataError(f"the labels {', '.join(found[:8])} are not those of the model: {', '.join(named)}")
    if all(name.isdecimal() for name in found):
        numbers = {name: int(name) for name in found}
        if max(numbers.values()) >= 10 * len(found):
            raise DataError(
                f"the labels are numbers up to {max(numbers.values())}, of {len(found)} classes; count from 0"
            )
        return numbers
    return {name: i for i, name in enumerate(found)}


def class_config(classes: dict[str, int], config: Any) -> dict[str, Any]:
    """What the config of a classifier says of its classes; nothing where it has names of its own."""
    named = dict(getattr(config, "label2id", None) or {})
    if named and not all(name.startswith("LABEL_") for name in named):
        return {}
    names = {number: name for name, number in classes.items()}
    id2label = {i: names.get(i, f"LABEL_{i}") for i in range(max(max(names) + 1, 2))}
    return {"num_labels": len(id2label), "id2label": id2label, "label2id": {n: i for i, n in id2label.items()}}

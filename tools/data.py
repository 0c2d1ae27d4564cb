"""Training text: read it, turn it into sequences of equal length, and deal them out in batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkft_fx.errors import CheckpointMismatch, DataError


def read_documents(path: Path, tokenizer: Any, field: str = "text") -> list[str]:
    """The documents of a file: each line's ``field`` (or chat) of a ``.jsonl`` file, or a text file as one.

    A line with ``messages`` and without ``field`` is rendered by the tokenizer's chat template. Raises
    `DataError` for a file that is missing, empty or not UTF-8, and for a line that cannot be used.
    """
    if not path.is_file():
        raise DataError(f"there is no text file at {path}; give the path of a text or jsonl file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); convert it to UTF-8") from error
    documents = [text]
    if path.suffix == ".jsonl":
        # not splitlines: JSON strings may hold characters that Python counts as line ends
        lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        documents = [_document(f"{path} line {i}", line, tokenizer, field) for i, line in lines]
    if not any(document.strip() for document in documents):
        raise DataError(f"{path} holds no text; give a file with text to train on")
    return documents


def _document(where: str, line: str, tokenizer: Any, field: str) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(entry, dict) or not entry.keys() & {field, "messages"}:
        raise DataError(f'{where} has neither a field "{field}" nor "messages"; name the field with --field')
    if field in entry:
        if not isinstance(entry[field], str):
            raise DataError(f'{where}: field "{field}" is {type(entry[field]).__name__}, not text')
        return str(entry[field])
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(f'{where} holds "messages", but the tokenizer has no chat template; give plain text instead')
    try:
        return str(tokenizer.apply_chat_template(entry["messages"], tokenize=False))
    except Exception as error:  # templates run arbitrary code and raise whatever they like
        raise DataError(f"{where}: the chat template refused these messages: {error}") from error


def pack(documents: Sequence[str], tokenizer: Any, length: int) -> Tensor:
    """All documents as one token stream, an end-of-text token after each, cut into ``i64[sequences, length]``.

    The remainder that fills no sequence is dropped. Raises `DataError` when not even one is filled.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for document in documents:
        stream += tokenizer(document, add_special_tokens=False, verbose=False).input_ids + end
    count = len(stream) // length
    if count == 0:
        raise DataError(f"the text has {len(stream)} tokens, too few for one sequence of {length}; lower --seq-len")
    return torch.tensor(stream[: count * length], dtype=torch.int64).view(count, length)


@dataclass
class Batches:
    """Endless shuffled batches of ``sequences`` (``i64[sequences, length]``), a new order from ``seed`` each epoch.

    ``position`` is the number of batches dealt so far: with the same sequences, batch size and seed it is
    all that a resumed run needs. The last sequences of an epoch that fill no batch are left out.
    """

    sequences: Tensor
    batch_size: int
    seed: int
    position: int = 0

    def __post_init__(self) -> None:
        if self.batch_size > len(self.sequences):
            raise DataError(
                f"the text fills {len(self.sequences)} sequences, fewer than a batch of {self.batch_size}; "
                "lower --batch-size or --seq-len"
            )

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        """The next ``i64[batch_size, length]``."""
        epoch, index = divmod(self.position, len(self.sequences) // self.batch_size)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.sequences), generator=generator)
        self.position += 1
        return self.sequences[order[index * self.batch_size : (index + 1) * self.batch_size]]

    def state_dict(self) -> dict[str, int]:
        """The position, and what it means nothing without."""
        return {"position": self.position, "batch_size": self.batch_size, "seed": self.seed} | self._shape()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where a run over the same sequences was saved; raises `CheckpointMismatch` for others."""
        changed = {k: v for k, v in self.state_dict().items() if k != "position" and state.get(k) != v}
        if changed:
            saved = ", ".join(f"{k} {state.get(k)} (now {v})" for k, v in changed.items())
            raise CheckpointMismatch(f"the checkpoint was saved with other data: {saved}; resume with the same")
        self.position = state["position"]

    def _shape(self) -> dict[str, int]:
        return {"sequences": len(self.sequences), "length": self.sequences.shape[1]}

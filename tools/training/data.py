"""Reads training text, cuts it into sequences of equal length, and deals them out in batches."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkft_fx.errors import CheckpointMismatch, DataError

LINES = (".jsonl", ".ndjson")


class Rendered(str):
    """A document that a chat template wrote: it has all of the tokenizer's special tokens in it already."""


def read_documents(path: Path, tokenizer: Any, field: str = "text") -> list[str]:
    """The documents of a file: each line's ``field`` (or chat) of a ``.jsonl`` file, or a text file as one.

    A line with ``messages`` and without ``field`` is `Rendered` by the tokenizer's chat template. Documents of nothing
    but white space are left out, a byte order mark is no part of the text. Raises `DataError`, with file and
    line, for a file that is missing, empty or not UTF-8 text, and for a line that cannot be used.
    """
    text = _read(path)
    documents = [text]
    if path.suffix.lower() in LINES:
        # not splitlines: JSON strings may hold characters that Python counts as line ends
        lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        documents = [_document(f"{path} line {i}", line, tokenizer, field) for i, line in lines]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise DataError(f"{path} holds no text; give a file with text to train on")
    return documents


def _read(path: Path) -> str:
    """A file's text, with line ends as ``\\n``."""
    if not path.is_file():
        raise DataError(f"there is no text file at {path}; give the path of a text or jsonl file")
    if path.suffix.lower() == ".json":
        raise DataError(f"{path} is one JSON value; give a .jsonl file with an object on each line, or a text file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line} is not UTF-8 text ({error.reason}); convert the file to UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path} line {line} holds a NUL byte: this is UTF-16 or not text; convert the file to UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _document(where: str, line: str, tokenizer: Any, field: str) -> str:
    entry = _parse(where, line)
    if not isinstance(entry, dict) or not entry.keys() & {field, "messages"}:
        raise DataError(f'{where} has neither a field "{field}" nor "messages"; name the field with --field')
    if field in entry:
        if not isinstance(entry[field], str):
            raise DataError(f'{where}: field "{field}" is {type(entry[field]).__name__}, not text')
        return _encodable(where, entry[field])
    return Rendered(_encodable(where, _render(where, entry["messages"], tokenizer)))


def _parse(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError as error:
        raise DataError(f"{where} is JSON nested too deeply to be read; remove the line") from error
    except ValueError as error:  # also integers of more digits than Python converts
        raise DataError(f"{where} is not JSON: {error}") from error


def _render(where: str, messages: Any, tokenizer: Any) -> str:
    """A chat as the tokenizer's template writes it."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(f'{where} holds "messages", but the tokenizer has no chat template; give plain text instead')
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise DataError(f'{where}: "messages" is not a list of objects such as {{"role": "user", "content": "..."}}')
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates run arbitrary code and raise whatever they like
        raise DataError(f"{where}: the chat template refused these messages: {error}") from error


def _encodable(where: str, text: str) -> str:
    """The text, unless it has half of a surrogate pair: JSON can write one, but no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(f"{where} holds {half}, half of a surrogate pair, which is no text; remove it") from error
    return text


def pack(documents: Sequence[str], tokenizer: Any, length: int) -> Tensor:
    """All documents as one token stream, cut into ``i64[sequences, length]``.

    Each document gets the special tokens that the tokenizer itself adds, and an end-of-text token behind it; neither is
    doubled where the text already has it. `Rendered` chats have what their template wrote, and the end. Where all
    documents begin with the tokenizer's first token, each sequence does, also one in the middle of a document: models
    that were trained that way go wrong without it. The remainder that fills no sequence is dropped. Raises
    `DataError` when not even one is filled.
    """
    if length < 2:
        raise DataError(
            f"sequences of {length} token(s) teach nothing: each is learnt from those before; raise --seq-len"
        )
    tokens = [_tokens(document, tokenizer) for document in documents]
    begin = tokenizer.bos_token_id
    first = [begin] if begin is not None and all(ids[:1] == [begin] for ids in tokens) else []
    stream = list(itertools.chain.from_iterable(tokens))
    rows: list[list[int]] = []
    done = 0
    while done < len(stream):
        row = [] if stream[done : done + 1] == first else first
        taken = length - len(row)
        rows.append(row + stream[done : done + taken])
        done += taken
    if rows and len(rows[-1]) < length:
        rows.pop()
    if not rows:
        raise DataError(f"the text has {len(stream)} tokens, too few for one sequence of {length}; lower --seq-len")
    return torch.tensor(rows, dtype=torch.int64)


def _tokens(document: str, tokenizer: Any) -> list[int]:
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    is_plain = not isinstance(document, Rendered)
    ids = list(tokenizer(str(document), add_special_tokens=is_plain, verbose=False).input_ids)
    if begin is not None and begin != end and ids[:2] == [begin, begin]:
        ids = ids[1:]  # one from the text itself, one from the tokenizer
    if end is not None and ids[-1:] != [end]:
        ids.append(end)
    return ids


def check_vocabulary(sequences: Tensor, tokenizer: Any, vocabulary: int) -> None:
    """Raise `DataError` if ``sequences`` hold a token that a model with ``vocabulary`` embeddings does not have."""
    largest = int(sequences.max())
    if largest >= vocabulary:
        raise DataError(
            f"the text has token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), the model only tokens below "
            f"{vocabulary}: the tokenizer (of {len(tokenizer)} tokens) belongs to another model, or the model must be "
            "resized and saved with it first"
        )


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

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, and over what it counts: ``text`` is a digest of all tokens."""
        return {
            "position": self.position,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "sequences": len(self.sequences),
            "length": self.sequences.shape[1],
            "text": self._digest,
        }

    @functools.cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self.sequences.contiguous().numpy().data).hexdigest()[:16]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a run over the same sequences was saved; raises `CheckpointMismatch` for others."""
        changed = {k: v for k, v in self.state_dict().items() if k != "position" and state.get(k) != v}
        if changed:
            saved = ", ".join(f"{k} {state.get(k)} (now {v})" for k, v in changed.items())
            raise CheckpointMismatch(f"the checkpoint was saved with other data: {saved}; resume with the same")
        position = state.get("position")
        if not isinstance(position, int) or position < 0:
            raise CheckpointMismatch(f"the checkpoint's position in the data is {position!r}, not a count of batches")
        self.position = position

"""Writes token ids of one model as those of another one, so that both see the same text.

    python -m benchmarks.quality.retokenize IDS.npz MODEL OTHER OUT.npz

``IDS.npz`` has flat arrays ``train`` and ``val`` of ids of ``MODEL``, with its end token behind each document.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from chunkft_fx.tools.load import load_tokenizer


def documents(ids: Any, end: int) -> Iterator[Any]:
    """The ids between end tokens."""
    for part in np.split(ids, np.flatnonzero(ids == end) + 1):
        if len(kept := part[part != end]):
            yield kept


def retokenized(ids: Any, old: Any, new: Any) -> Any:
    """The ids of ``new`` for the same documents, each with an end token behind it."""
    written: list[int] = []
    for document in documents(ids, old.eos_token_id):
        text = old.decode(document, clean_up_tokenization_spaces=False)
        written += [*new.encode(text, add_special_tokens=False), new.eos_token_id]
    return np.array(written, np.int32)


def main() -> None:
    """Read, convert and write both arrays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", type=Path)
    parser.add_argument("model", help="a folder, hub name or GGUF file")
    parser.add_argument("other", help="likewise")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    old, new = load_tokenizer(args.model), load_tokenizer(args.other)
    with np.load(args.ids) as arrays:
        written = {key: retokenized(arrays[key], old, new) for key in ("train", "val")}
    for key, ids in written.items():
        print(f"{key}: {len(ids)} tokens")
    np.savez_compressed(args.out, **written)


if __name__ == "__main__":
    main()

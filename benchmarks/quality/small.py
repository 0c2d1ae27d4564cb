"""Makes the small models with random weights, and trains the byte-level one on English before its runs begin.

Its shift is from the prose of Python's documentation to the source code of Python's library, which are installed.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch

from benchmarks.quality.data import Text, text_of
from benchmarks.quality.learn import rate

SMALL = {
    "vocab_size": 49152,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
NARROW = SMALL | {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
STEPS, BATCH, RATE = 600, 16, 2e-3  # of the training on English
FILES = 120  # of Python's library, the first by name
HELD_OUT_EVERY = 5


def random_model(config: dict[str, Any]) -> Any:
    """A Llama with the same random weights each time, in training mode."""
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).train()


def pretrained(length: int, path: Path, steps: int = STEPS) -> None:
    """Train the byte-level model on English, on one thread as its runs are, and save its weights at ``path``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        weights = _pretrained(length, steps)
    finally:
        torch.set_num_threads(threads)
    part = path.with_suffix(".part")
    torch.save(weights, part)
    part.replace(path)


def _pretrained(length: int, steps: int) -> dict[str, Any]:
    prose = _bytes("\n".join(topics.values()))
    english = prose[: len(prose) // length * length].reshape(-1, length)
    model = random_model(NARROW)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        rows = torch.randint(len(english), (BATCH,), generator=generator)
        ids = torch.from_numpy(english[rows].astype(np.int64))
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate(step, steps)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    weights: dict[str, Any] = model.state_dict()
    return weights


def source_code(length: int, held_out: int) -> Text:
    """Bytes of files of Python's library; whole files are held out."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:FILES]
    read = [_bytes(path.read_text(encoding="utf-8")) for path in paths]
    kept = [code for i, code in enumerate(read) if i % HELD_OUT_EVERY]
    arrays = {"train": np.concatenate(kept), "val": np.concatenate(read[::HELD_OUT_EVERY])}
    order = np.random.default_rng(0).permutation(len(arrays["val"]) // length)  # held-out sequences are of all files
    whole = arrays["val"][: len(order) * length].reshape(-1, length)
    return text_of(arrays | {"val": whole[order].ravel()}, length, held_out)


def _bytes(text: str) -> Any:
    return np.frombuffer(text.encode(), dtype=np.uint8)

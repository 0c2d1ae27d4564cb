"""Trainers of TRL for a tiny Llama, with data of words ``w0`` to ``w36``, and what their runs are compared by."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(37)]
SPECIAL = ["<pad>", "<eos>", "<unk>"]

disable_progress_bars()


def tokenizer() -> Any:
    """A token a word."""
    ids = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def llama(seed: int = 0) -> Any:
    """Its head is its embedding."""
    torch.manual_seed(seed)
    shape: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, vocab_size=40, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1)
    return LlamaForCausalLM(config)


def texts(count: int = 16) -> Any:
    """Documents of 4 to 11 words."""
    draw = random.Random(0)
    return Dataset.from_list([{"text": _words(draw, draw.randrange(4, 12))} for _ in range(count)])


def answers(count: int = 16) -> Any:
    """A prompt of 3 words, and a completion of 3 to 5."""
    draw = random.Random(1)
    rows = [{"prompt": _words(draw, 3), "completion": " " + _words(draw, draw.randrange(3, 6))} for _ in range(count)]
    return Dataset.from_list(rows)


def preferences(count: int = 16) -> Any:
    """A prompt of 3 words, and two completions of 3 to 5."""
    draw = random.Random(2)
    sides = ("chosen", "rejected")
    rows = [
        {"prompt": _words(draw, 3)} | {side: " " + _words(draw, draw.randrange(3, 6)) for side in sides}
        for _ in range(count)
    ]
    return Dataset.from_list(rows)


def _words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(count))


def arguments(kind: type, folder: Path, **given: Any) -> Any:
    """Arguments of a short run on the CPU, in float32."""
    asked = {"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "bf16": False}
    with warnings.catch_warnings():
        # of transformers' about the name of TRL's own default for activation checkpointing
        warnings.simplefilter("ignore", FutureWarning)
        return kind(output_dir=str(folder), weight_decay=0.1, **{**asked, **quiet, **given})


def losses(trainer: Any) -> Tensor:
    """All losses of training and evaluation that the trainer logged."""
    found = [e[k] for e in trainer.state.log_history for k in ("loss", "eval_loss") if k in e]
    assert found
    return torch.tensor(found)


def assert_same_losses(ours: Any, theirs: Any, atol: float = 1e-5) -> None:
    """Losses are the same to ``atol``."""
    torch.testing.assert_close(losses(ours), losses(theirs), rtol=0, atol=atol)


def assert_all_trained(model: nn.Module, before: nn.Module) -> None:
    """Every trainable tensor has changed."""
    same = [n for n, p in model.named_parameters() if p.requires_grad and torch.equal(p, before.get_parameter(n))]
    assert not same, f"not trained: {same}"

"""A tokenizer of characters and a model folder, made on the spot: no test needs a download."""

from __future__ import annotations

import string
from pathlib import Path

import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from chunkft_fx.tools.data.formats import document
from chunkft_fx.tools.data.records import records
from chunkft_fx.tools.data.tokens import written
from chunkft_fx.tools.zoo import tiny

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
TEMPLATE = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + ';' }}{% endfor %}"


def character_tokenizer(template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """One token a printable ASCII character; the ids fit the vocabulary of the tiny models."""
    vocabulary = {token: i for i, token in enumerate([PAD, BOS, EOS, *string.printable])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=PAD
    )
    tokenizer.chat_template = template
    return tokenizer


def texts(path: Path, tokenizer: transformers.PreTrainedTokenizerFast, field: str = "text") -> list[str]:
    """The text of each record of a file, conversations as the tokenizer's template writes them."""
    found = []
    for where, record in records(str(path)):
        made = document(where, record, field, tokenizer.chat_template is not None)
        found.append(written(where, made, tokenizer, all_learned=True).text)
    return found


def tiny_folder(folder: Path, family: str = "llama") -> Path:
    """A saved tiny model and tokenizer, as ``from_pretrained`` reads them."""
    model, _ = tiny(family)
    assert isinstance(model, transformers.PreTrainedModel)
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder

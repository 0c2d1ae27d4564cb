"""Special tokens: each document has those that its tokenizer adds, once, and an end."""

from __future__ import annotations

import pytest
import transformers
from tokenizers import processors

from chunkft_fx.errors import DataError
from chunkft_fx.tools.data.formats import document
from chunkft_fx.tools.data.stream import pack
from chunkft_fx.tools.data.tokens import check_vocabulary, tokenized, written
from tests.support.tiny_text import BOS, EOS, TEMPLATE, character_tokenizer


def with_first(single: str = f"{BOS} $A", template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that adds special tokens by itself, as Gemma's and Llama's do; each token a character."""
    tokenizer = character_tokenizer(template)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (BOS, EOS)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


def tokens(documents: list[str], tokenizer: transformers.PreTrainedTokenizerFast, length: int) -> list[str]:
    (ids,) = pack(documents, tokenizer, length).tolist()
    names: list[str] = tokenizer.convert_ids_to_tokens(ids)
    return names


def test_each_document_begins_as_its_tokenizer_begins_one() -> None:
    assert tokens(["ab", "c"], with_first(), 7) == [BOS, "a", "b", EOS, BOS, "c", EOS]
    assert tokens(["ab", "c"], character_tokenizer(), 5) == ["a", "b", EOS, "c", EOS]


def test_a_sequence_in_the_middle_of_a_document_begins_like_a_document() -> None:
    tokenizer = with_first()
    rows = [tokenizer.convert_ids_to_tokens(row) for row in pack(["abcde", "f"], tokenizer, 4).tolist()]
    assert rows == [[BOS, "a", "b", "c"], [BOS, "d", "e", EOS]]  # what is left fills no sequence


@pytest.mark.parametrize("length", [-1, 0, 1])
def test_sequences_that_teach_nothing_are_refused(length: int) -> None:
    for tokenizer in (with_first(), character_tokenizer()):
        with pytest.raises(DataError, match="teach nothing"):
            pack(["abc"], tokenizer, length)


def test_an_end_that_the_tokenizer_adds_is_not_doubled() -> None:
    assert tokens(["ab", "c"], with_first(f"{BOS} $A {EOS}"), 7) == [BOS, "a", "b", EOS, BOS, "c", EOS]
    assert tokens(["ab", "c"], with_first(f"$A {EOS}"), 5) == ["a", "b", EOS, "c", EOS]


def test_special_tokens_in_the_text_itself_are_not_doubled() -> None:
    assert tokens([f"{BOS}ab{EOS}", "c"], with_first(), 7) == [BOS, "a", "b", EOS, BOS, "c", EOS]


@pytest.mark.parametrize(("first", "last"), [("", ""), ("{{ bos_token }}", ""), ("{{ bos_token }}", "{{ eos_token }}")])
def test_a_chat_has_what_its_template_wrote_and_an_end(first: str, last: str) -> None:
    tokenizer = with_first(template=first + TEMPLATE + last)
    chat = document("here", {"messages": [{"role": "assistant", "content": "a"}]})
    (piece,) = tokenized([written("here", chat, tokenizer)], tokenizer)
    begin = [BOS] if first else []
    assert tokenizer.convert_ids_to_tokens(piece.ids) == [*begin, *"assistant:a;", EOS]


def test_an_end_that_a_template_writes_before_a_break_is_the_end() -> None:
    tokenizer = with_first(template=TEMPLATE + "{{ eos_token + '\n' }}")
    chat = document("here", {"messages": [{"role": "assistant", "content": "a"}]})
    (piece,) = tokenized([written("here", chat, tokenizer)], tokenizer)
    assert tokenizer.convert_ids_to_tokens(piece.ids) == [*"assistant:a;", EOS, "\n"]


def test_tokens_without_embeddings_are_refused() -> None:
    tokenizer = character_tokenizer()
    sequences = pack(["ab~"], tokenizer, 4)
    largest = int(sequences.max())
    check_vocabulary(largest, tokenizer, largest + 1)
    with pytest.raises(DataError, match=rf"token {largest} \('~'\), the model only tokens below {largest}"):
        check_vocabulary(largest, tokenizer, largest)

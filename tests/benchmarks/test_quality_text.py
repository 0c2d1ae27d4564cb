"""Texts of the learning benchmark: sequences and labels, docstrings and chats of them, a text in other tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import decoders

from benchmarks.quality.data import IGNORED, read_text, text_of
from benchmarks.quality.documentation import LONGEST, Entry, chat, chats, distinct, docstrings, plain, shortened
from benchmarks.quality.learn import held_out_loss
from benchmarks.quality.retokenize import retokenized
from benchmarks.quality.small import NARROW, random_model, source_code
from tests.support.tiny_text import TEMPLATE, character_tokenizer

SOURCE = '''
"""Of the module."""

class Box:
    """Holds
        one thing."""

    def open(self, key: int = 0) -> None:
        """Opens it."""

async def wait(*args): "Waits."
'''


def test_docstrings_have_the_names_and_arguments_of_what_they_are_about() -> None:
    found = list(docstrings(SOURCE, "a/b.py", "a.b"))
    assert [(e.kind, e.name, e.text) for e in found] == [
        ("module", "a.b", "Of the module."),
        ("class", "a.b.Box", "Holds\none thing."),
        ("method", "a.b.Box.open(self, key: int=0)", "Opens it."),
        ("function", "a.b.wait(*args)", "Waits."),
    ]
    assert len({e.is_held_out for e in found}) == 1  # whole files are held out


def test_equal_texts_count_once_and_the_order_is_that_of_no_file() -> None:
    texts = [f"{i} " * 60 for i in range(20)]
    given = [Entry(False, "function", f"f{i}", text) for i, text in enumerate(texts)]
    twice = [
        Entry(True, "function", "other", texts[3].upper().replace(" ", "\n")),
        Entry(False, "function", "g", "short"),
    ]
    found = distinct(given + twice)
    assert sorted(e.name for e in found) == sorted(e.name for e in given)
    assert found == distinct([*given]) and found != given


def test_long_texts_end_with_a_paragraph_or_a_line() -> None:
    paragraph = "word " * 98 + "word"
    assert shortened("\n\n".join([paragraph] * 5)) == "\n\n".join([paragraph] * 3)
    assert shortened("\n".join(["line"] * 1000)).splitlines() == ["line"] * (LONGEST // 5)
    assert len(shortened("x" * 5000)) == LONGEST


def test_only_answers_of_chats_are_labels_and_no_chat_lies_across_sequences() -> None:
    tokenizer = character_tokenizer(TEMPLATE)
    answers = ["An answer of its own: " + "abc " * n for n in (5, 12, 40, 3)]
    entries = [Entry(False, "function", f"f{i}()", text) for i, text in enumerate(answers)]
    ids, counts = chats(entries, tokenizer, 160)
    assert len(ids) == len(counts) and len(ids) % 160 == 0
    questions = [chat(entry, tokenizer)[0] for entry in entries]
    room = [160 - len(question) for question in questions]  # the third answer is cut off where its sequence ends
    expected = [f"assistant:{text};"[:most] for text, most in zip(answers, room, strict=True)]
    said = tokenizer.convert_ids_to_tokens([i for i, is_label in zip(ids, counts, strict=True) if is_label])
    assert "".join(said) == "".join(expected) and len(expected[2]) < len(answers[2])
    for start in range(0, len(ids), 160):
        assert tokenizer.decode(ids[start : start + 160]).replace(" ", "").startswith("user:")


def test_every_token_of_plain_text_is_a_label() -> None:
    tokenizer = character_tokenizer()
    ids, counts = plain([Entry(False, "function", "f", "does it"), Entry(False, "class", "G", "is it")], tokenizer)
    assert ids.count(tokenizer.eos_token_id) == 2 and all(counts) and len(ids) == len(counts)


def test_labels_that_do_not_count_are_ignored_and_texts_have_digests(tmp_path: Path) -> None:
    counts = np.arange(21) % 3 == 0
    arrays = {"train": np.arange(41), "val": np.arange(21, dtype=np.uint16), "val_counts": counts}
    text = text_of(arrays, 5, 3)
    assert text.training.ids.shape == (8, 5) and torch.equal(text.training.labels, text.training.ids)
    expected = torch.where(torch.from_numpy(counts[:15]), torch.arange(15), IGNORED).view(3, 5)
    assert torch.equal(text.held_out.labels, expected)
    assert text.held_out.counted(slice(0, 2)) == int(counts[1:5].sum() + counts[6:10].sum())
    np.savez(tmp_path / "ids.npz", **arrays)
    assert read_text(tmp_path / "ids.npz", 5, 3).digest == text.digest
    assert text_of(arrays | {"val_counts": ~counts}, 5, 3).digest != text.digest
    with pytest.raises(ValueError, match="8 sequences to train on and 4 of 5 to hold out"):
        text_of(arrays, 5, 5)


def test_the_held_out_loss_is_the_mean_over_labels_that_count() -> None:
    model = random_model(NARROW | {"num_hidden_layers": 1})
    flat = torch.randint(256, (40 * 16,), generator=torch.Generator().manual_seed(0)).numpy()
    text = text_of({"train": flat, "val": flat, "val_counts": flat < 100}, 16, 40)
    logits = model(input_ids=text.held_out.ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, text.held_out.labels[:, 1:].flatten(), ignore_index=IGNORED)
    assert held_out_loss(model, text.held_out, torch.device("cpu")) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert model.training


def test_the_byte_level_text_is_the_same_each_time_and_of_other_files() -> None:
    text = source_code(64, 256)
    assert text.digest == source_code(64, 256).digest
    assert len(text.held_out) == 256 and len(text.training) > 480 * 16 // 2
    seen = {bytes(row) for row in text.training.ids.to(torch.uint8).numpy()}
    assert not seen & {bytes(row) for row in text.held_out.ids.to(torch.uint8).numpy()}


def test_documents_keep_their_text_in_other_tokens() -> None:
    old, new = character_tokenizer(), character_tokenizer()
    for tokenizer in (old, new):
        tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    new.add_tokens(["the"])
    ids = [*old.encode("the cat"), old.eos_token_id, *old.encode("a hat"), old.eos_token_id]
    written = retokenized(np.array(ids), old, new)
    assert len(written) < len(ids) and list(written).count(new.eos_token_id) == 2
    assert new.decode(written) == old.decode(ids) == "the cat</s>a hat</s>"

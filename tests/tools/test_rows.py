"""Rows of several documents: which share one, what of each is learned, and that a model learns them as if alone."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import chunkft_fx
from chunkft_fx.errors import DataError, OptionError
from chunkft_fx.tools.data import store
from chunkft_fx.tools.data.packing import BLOCK, fill
from chunkft_fx.tools.data.rows import IGNORED, Packed, Padded, Pieces, block_mask, learned_count
from chunkft_fx.tools.data.store import Reading, stored
from chunkft_fx.tools.models.apart import needs_masks
from chunkft_fx.tools.models.tasks import Masked
from chunkft_fx.tools.report.sample import describe
from chunkft_fx.tools.setup.prepare import DataOptions, prepare
from chunkft_fx.tools.training.data import Batches
from chunkft_fx.tools.training.loop import train
from chunkft_fx.tools.training.options import TrainOptions
from chunkft_fx.tools.zoo import tiny
from tests.support.tiny_text import EOS, character_tokenizer

PAIRS = [("ab", "cdefg"), ("", "hij"), ("klmno", "p"), ("q", "rstuvwxyz"), ("A", "BC"), ("DE", "FGHIJ")]


def lines(tmp_path: Path, records: list[Any], name: str = "data.jsonl") -> str:
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def kept(source: str, **reading: Any) -> Pieces:
    data = stored([source], character_tokenizer(), Reading(**reading))
    return Pieces(data, np.arange(len(data)))


@pytest.fixture
def pairs(tmp_path: Path) -> Pieces:
    return kept(lines(tmp_path, [{"prompt": p, "completion": c} for p, c in PAIRS]), length=16)


@given(st.lists(st.integers(0, 12), max_size=60), st.integers(12, 30))
def test_each_piece_is_in_one_row_and_no_row_is_too_long(lengths: list[int], length: int) -> None:
    rows = list(fill(lengths, length))
    assert sorted(i for row in rows for i in row) == [i for i, n in enumerate(lengths) if n]
    assert all(sum(lengths[i] for i in row) <= length for row in rows)
    # no two rows could be one
    loads = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(loads) < 2 or loads[0] + loads[1] > length


def test_rows_hold_neighbours_of_the_data_set() -> None:
    rows = list(fill([1] * (BLOCK + 2), 2 * BLOCK))
    assert rows == [list(range(BLOCK)), [BLOCK, BLOCK + 1]]


def test_a_packed_row_has_positions_and_labels_of_its_documents(pairs: Pieces) -> None:
    tokenizer = character_tokenizer()
    rows = Packed(pairs, 16, tokenizer.pad_token_id)
    assert len(rows) == 3
    batch = rows.batch(range(3), 0)
    assert {name: tuple(t.shape) for name, t in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "position_ids"), (3, 16)
    )
    seen = []
    for ids, labels, positions in zip(*batch.values(), strict=True):
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), 16]
        for a, b in itertools.pairwise(starts):
            assert positions[a:b].tolist() == list(range(b - a))
            if ids[a] == tokenizer.pad_token_id:
                assert (labels[a:b] == IGNORED).all()
                continue
            text = "".join(tokenizer.convert_ids_to_tokens(ids[a:b].tolist()))
            prompt = next(p for p, c in PAIRS if p + c + EOS == text)
            learned = labels[a:b] != IGNORED
            assert learned.tolist() == [i >= max(len(prompt), 1) for i in range(b - a)]
            assert torch.equal(labels[a:b][learned], ids[a:b][learned])
            seen.append(text)
    assert sorted(seen) == sorted(p + c + EOS for p, c in PAIRS)


def test_a_padded_row_is_a_document_as_long_as_the_longest_rounded_up(pairs: Pieces) -> None:
    rows = Padded(pairs, 512, 0)
    assert (len(rows), rows.length) == (6, 16)
    assert Padded(pairs, 13, 0).length == 13
    batch = rows.batch([0], 0)
    assert batch["attention_mask"][0].sum() == 8
    assert (batch["labels"][0, 8:] == IGNORED).all()
    assert learned_count(batch, shifted=True) == 6
    assert describe(batch, character_tokenizer())[0] == "document 1, tokens 0 to 7, 6 of 8 learned"
    assert describe(batch, character_tokenizer())[-1] == "padding, 8 tokens"


def per_document(model: Any, pairs: Pieces) -> Any:
    """The loss of each document alone, summed over what is learned, and how much that is."""
    for i in range(len(pairs.lengths)):
        ids, labels = pairs[i]
        count = int((labels[1:] != IGNORED).sum())
        yield model(input_ids=ids[None], labels=labels[None], use_cache=False).loss * count, count


@pytest.mark.parametrize(
    ("family", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("opt", "sdpa")]
)
def test_packed_documents_have_the_logits_that_they_have_alone(pairs: Pieces, family: str, attention: str) -> None:
    model: Any = tiny(family)[0].eval()
    model.set_attn_implementation(attention)
    rows = Packed(pairs, 16, 0)
    masked = needs_masks(model, 100, family)
    assert masked == (family == "opt")
    if masked:
        rows.mask = lambda positions: block_mask(positions, causal=True)
    batch = rows.batch(range(len(rows)), 0)
    del batch["labels"]
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits
        for row, (ids, positions) in enumerate(zip(batch["input_ids"], batch["position_ids"], strict=True)):
            starts = [*torch.nonzero(positions == 0).flatten().tolist(), 16]
            for a, b in itertools.pairwise(starts):
                alone = model(input_ids=ids[None, a:b], use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, a:b], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_packed_rows_train_as_documents_one_by_one(pairs: Pieces, family: str) -> None:
    """Two micro-batches of uneven numbers of labels a step, beside torch's AdamW on the plain model."""
    options = TrainOptions(3, 1, 3, lr=1e-3, schedule="constant", max_grad_norm=None)
    plain: Any = tiny(family, torch.float64)[0]
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=options.weight_decay)
    losses = []
    for _ in range(3):
        each = list(per_document(plain, pairs))
        loss = sum(part for part, _ in each) / sum(count for _, count in each)
        loss.backward()
        theirs.step()
        theirs.zero_grad()
        losses.append(float(loss.detach()))
    rows = Packed(pairs, 16, 0)
    assert len(rows) == 3  # an epoch is a step, whatever the order
    model = tiny(family, torch.float64)[0]
    if needs_masks(model, 100, family):
        rows.mask = lambda positions: block_mask(positions, causal=True)
    compiled = chunkft_fx.compile(model, "1GB", coverage="all", backend="eager")
    report = train(compiled, rows, options)
    assert report.losses == pytest.approx(losses, rel=1e-6)
    for ours, expected in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "task", "fault"),
    [
        ("roberta", "masked", "has a document see the one in front of it"),
        ("mamba", "causal", "has a document see the one in front of it"),
    ],
)
def test_models_that_would_mix_documents_are_refused(family: str, task: str, fault: str) -> None:
    if family == "mamba":
        config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=110, state_size=4)
        model: Any = transformers.MambaForCausalLM(config)
    else:
        model = tiny(family)[0]
    with pytest.raises(OptionError, match=rf"model 'it' {fault} when several are packed in a row; give --no-packing"):
        needs_masks(model, 100, "it", task)
    assert model.training


def test_layers_with_windows_get_no_mask_that_would_widen_them() -> None:
    model: Any = tiny("bert")[0]
    assert needs_masks(model, 100, "it", "masked")
    model.config.local_attention = 4
    with pytest.raises(OptionError, match="give --no-packing"):
        needs_masks(model, 100, "it", "masked")


def test_tokens_are_kept_on_disk_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = lines(tmp_path, [{"text": "abc"}, {"text": " \n"}, {"text": "defghijk"}])
    first = kept(source, length=6)
    assert first.lengths.tolist() == [4, 0, 6, 3]  # white space is left out, what is too long split
    assert first.data.data.column("document").to_pylist() == [0, 1, 2, 2]

    def refuse(*_: Any) -> Any:
        raise AssertionError("read again")

    monkeypatch.setattr(store, "records", refuse)
    assert kept(source, length=6).digest == first.digest
    with pytest.raises(DataError, match="read again"):
        kept(source, length=7)
    Path(source).write_text(json.dumps({"text": "abd"}))
    with pytest.raises(DataError, match="read again"):
        kept(source, length=6)


def test_a_reply_that_is_too_long_is_cut_and_one_beyond_its_prompt_left_out(tmp_path: Path) -> None:
    pieces = kept(
        lines(tmp_path, [{"prompt": "ab", "completion": "cdef"}, {"prompt": "abcdefgh", "completion": "i"}]), length=5
    )
    assert pieces.lengths.tolist() == [5, 0]
    assert (pieces.total("cut"), pieces.largest) == (2 + 10, character_tokenizer().convert_tokens_to_ids("e"))


def test_a_fault_in_the_data_is_one_error_with_its_place(tmp_path: Path) -> None:
    source = lines(tmp_path, [{"text": "a"}, {"txt": "b"}])
    with pytest.raises(DataError, match=r"data\.jsonl line 2 has the fields txt; known are chat: messages;"):
        kept(source, length=8)


def test_other_data_has_another_digest(tmp_path: Path) -> None:
    texts = ["abc", "abd", "ab"]
    found = {kept(lines(tmp_path, [{"text": t}, {"text": "x"}], f"{t}.jsonl"), length=8).digest for t in texts}
    assert len(found) == 3


def prepared(source: str, **options: Any) -> Any:
    data = DataOptions([source], Reading(options.pop("length", 16)), **options)
    return prepare(character_tokenizer(), None, data, "causal", seed=0)


def documents(pieces: Pieces) -> set[int]:
    return set(pieces.data.data.column("document").to_numpy()[pieces.chosen].tolist())


def test_a_share_of_the_documents_is_held_out_whole(tmp_path: Path) -> None:
    source = lines(tmp_path, [{"text": string * 12} for string in "abcdefgh"])
    data = prepared(source, share=0.25, length=5)
    training, held = (documents(rows.pieces) for rows in (data.rows, data.held_out))
    assert len(held) == 2
    assert training | held == set(range(8)) and not training & held
    again = prepared(source, share=0.25, length=5)
    assert np.array_equal(again.held_out.pieces.chosen, data.held_out.pieces.chosen)
    assert "are held out" in data.lines[1]


def test_of_one_document_the_end_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh" * 10)
    data = prepared(str(tmp_path / "a.txt"), share=0.1, length=10)
    assert data.held_out.pieces.chosen.tolist() == [7]  # behind it is an end of text alone
    (tmp_path / "b.txt").write_text("ab")
    with pytest.raises(DataError, match="leaves nothing of so little data"):
        prepared(str(tmp_path / "b.txt"), share=0.1)


def test_a_run_goes_on_at_the_sample_where_it_was(pairs: Pieces) -> None:
    batches = Batches(Packed(pairs, 16, 0), 2, seed=3)
    for _ in range(3):
        next(batches)
    resumed = Batches(Packed(pairs, 16, 0), 2, seed=3)
    resumed.load_state_dict(batches.state_dict())
    for _ in range(4):
        ours, theirs = next(resumed), next(batches)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_masked_rows_hide_the_same_tokens_at_the_same_position(pairs: Pieces) -> None:
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    rows = Masked(Padded(pairs, 16, tokenizer.pad_token_id), tokenizer, seed=1)
    first, same, other = (rows.batch(range(6), position) for position in (4, 4, 5))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["labels"], other["labels"])
    learned = first["labels"] != IGNORED
    whole = rows.rows.batch(range(6), 0)["input_ids"]
    assert torch.equal(first["labels"][learned], whole[learned])
    assert not (first["labels"] == tokenizer.pad_token_id).any()
    assert all(learned_count(rows.batch([1], position), shifted=False) for position in range(20))
    with pytest.raises(OptionError, match="has none"):
        Masked(rows.rows, character_tokenizer(), seed=1)

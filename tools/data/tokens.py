"""Makes tokens of documents, each token with whether it is learned, and cuts them into pieces that fit a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from chunkft_fx.errors import DataError
from chunkft_fx.tools.data.formats import Chat, Document, Reply, Text
from chunkft_fx.tools.data.templates import Span, rendered


@dataclass(frozen=True)
class Written:
    """A document as one text: which places of it are learned, and what is still to be added to it.

    ``special`` adds the tokens that the tokenizer itself adds, ``ends`` an end-of-text token where there is none.
    ``may_split`` cuts it into several pieces where it is too long, in place of leaving off its end.
    ``lost`` counts turns of the assistant that have no place in the text.
    """

    text: str
    spans: tuple[Span, ...]
    special: bool = True
    ends: bool = True
    may_split: bool = False
    lost: int = 0


@dataclass(frozen=True)
class Piece:
    """What goes into one row: token ids, which are learned, and how many tokens behind them were left off."""

    ids: list[int]
    learned: list[bool]
    cut: int = 0
    lost: int = 0


def written(where: str, document: Document, tokenizer: Any, all_learned: bool = False) -> Written:
    """A document as text, ``all_learned`` with its prompts; raises `DataError` for what no tokenizer can read."""
    if isinstance(document, Text):
        text = encodable(where, document.text)
        return Written(text, ((0, len(text)),), document.is_first, document.is_last, may_split=True)
    if isinstance(document, Reply):
        text = encodable(where, document.prompt + document.completion)
        return Written(text, ((0 if all_learned else len(document.prompt), len(text)),))
    assert isinstance(document, Chat)
    text, spans, lost = rendered(where, document, tokenizer)
    encodable(where, text)
    # a template may end the last turn itself, with a break behind the end
    ends = not (spans and tokenizer.eos_token and tokenizer.eos_token in text[spans[-1][0] :])
    if all_learned:
        return Written(text, ((0, len(text)),), special=False, ends=ends)
    if not spans:
        roles = ", ".join(dict.fromkeys(str(message.get("role")) for message in document.messages))
        if any(message.get("weight") == 0 for message in document.messages):
            roles += ", some of a weight of 0"
        why = "the chat template writes them in another way once others follow" if lost else f"its roles are {roles}"
        raise DataError(
            f"{where} has no turn of the assistant to learn ({why}); mend it, or give --train-on-prompts to learn all"
        )
    return Written(text, tuple(spans), special=False, ends=ends, lost=lost)


def encodable(where: str, text: str) -> str:
    """The text, unless it has half of a surrogate pair: JSON can write one, but no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(f"{where} holds {half}, half of a surrogate pair, which is no text; remove it") from error
    return text


def tokenized(documents: Sequence[Written], tokenizer: Any) -> Iterator[Piece]:
    """The tokens of each document, whole. Documents side by side share the tokenizer's threads."""
    ids: dict[int, tuple[list[int], list[bool]]] = {}
    for special in (True, False):
        chosen = [i for i, d in enumerate(documents) if d.special == special]
        if not chosen:
            continue
        if not tokenizer.is_fast:
            ids |= {i: _by_parts(documents[i], tokenizer) for i in chosen}
            continue
        texts = [documents[i].text for i in chosen]
        found = tokenizer(texts, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        for i, tokens, places in zip(chosen, found["input_ids"], found["offset_mapping"], strict=True):
            ids[i] = (list(tokens), _learned(documents[i], places))
    for i, document in enumerate(documents):
        yield _ended(document, *ids[i], tokenizer)


def _learned(document: Written, places: Iterable[Span]) -> list[bool]:
    """Whether each token begins in a place that is learned; those without a place are, where all of the text is."""
    is_all = document.spans == ((0, len(document.text)),)
    return [is_all or any(a <= start < b for a, b in document.spans if start < stop) for start, stop in places]


def _by_parts(document: Written, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """For tokenizers that do not say where their tokens are: each part of the text by itself."""
    ids: list[int] = []
    learned: list[bool] = []
    place = 0
    ends = [(start, False) for start, _ in document.spans] + [(stop, True) for _, stop in document.spans]
    for end, is_learned in [*sorted(ends), (len(document.text), False)]:
        if end > place:
            tokens = tokenizer(document.text[place:end], add_special_tokens=document.special and not ids, verbose=False)
            ids += tokens.input_ids
            learned += [is_learned] * (len(ids) - len(learned))
            place = end
    return ids, learned


def _ended(document: Written, ids: list[int], learned: list[bool], tokenizer: Any) -> Piece:
    """The tokens with one beginning, and with an end where the document has none."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is not None and begin != end and ids[:2] == [begin, begin]:
        ids, learned = ids[1:], learned[1:]  # one from the text itself, one from the tokenizer
    if end is None or not document.ends or ids[-1:] == [end]:
        return Piece(ids, learned, lost=document.lost)
    return Piece([*ids, end], [*learned, True], lost=document.lost)


def pieces(document: Written, whole: Piece, length: int, begin: Sequence[int]) -> Iterator[Piece]:
    """A document's tokens in pieces of at most ``length``; each has ``begin`` in front, as the tokenizer would put it.

    What may not be split is cut. A piece of which nothing can be learned comes out empty.
    """
    ids, learned, lost = whole.ids, whole.learned, whole.lost
    if not document.may_split:
        yield _useful(Piece(ids[:length], learned[:length], max(len(ids) - length, 0), lost))
        return
    done = 0
    while done < len(ids) or not done:
        front = [] if ids[done : done + 1] == list(begin) else list(begin)
        taken = length - len(front)
        part = slice(done, done + taken)
        yield _useful(Piece(front + ids[part], [False] * len(front) + learned[part], 0, lost))
        done += taken


def _useful(piece: Piece) -> Piece:
    """The piece, or an empty one where nothing is learned: a token is learned from those before it."""
    if any(piece.learned[1:]):
        return piece
    return Piece([], [], piece.cut + len(piece.ids), piece.lost)


def beginning(tokenizer: Any) -> list[int]:
    """The token that a tokenizer puts in front of every text, if any: models that had it go wrong without."""
    ids = tokenizer("a", verbose=False).input_ids
    return (
        [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else []
    )


def check_vocabulary(largest: int, tokenizer: Any, vocabulary: int) -> None:
    """Raise `DataError` if the largest token of the data is one that a model of ``vocabulary`` embeddings has not."""
    if largest >= vocabulary:
        raise DataError(
            f"the text has token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), the model only tokens below "
            f"{vocabulary}: the tokenizer (of {len(tokenizer)} tokens) belongs to another model, or the model must be "
            "resized and saved with it first"
        )

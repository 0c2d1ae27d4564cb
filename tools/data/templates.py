"""Writes conversations by the tokenizer's chat template, and finds in the text what the assistant says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from chunkft_fx.errors import DataError, OptionError
from chunkft_fx.tools.data.formats import Chat

# For tokenizers without one: Zephyr's, which needs no tokens but the end of text, and ChatML, which has two of its own.
BUILT_IN = {
    "zephyr": "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
}
MARKS = {"chatml": ("<|im_start|>", "<|im_end|>")}

Span = tuple[int, int]


def set_template(tokenizer: Any, given: str) -> None:
    """Give a tokenizer the chat template of a name in `BUILT_IN` or of a file; ``""`` leaves its own."""
    if not given:
        return
    if given in BUILT_IN:
        marks = [mark for mark in MARKS.get(given, ()) if mark not in tokenizer.get_vocab()]
        if marks:
            named = " ".join(f"--add-special-tokens '{mark}'" for mark in marks)
            raise OptionError(
                f"chat-template {given} has marks that the tokenizer does not know as tokens; give {named}"
            )
        if tokenizer.eos_token is None:
            raise OptionError(
                f"chat-template {given} ends each turn with an end-of-text token, and the tokenizer has none"
            )
        tokenizer.chat_template = BUILT_IN[given]
        return
    check_template(given)
    tokenizer.chat_template = Path(given).read_text()


def check_template(given: str) -> None:
    """Raise `OptionError` for a chat template that is neither built in nor a file."""
    if given and given not in BUILT_IN and not Path(given).is_file():
        raise OptionError(
            f"chat-template {given!r} is no file; give one with a Jinja template, or {', '.join(BUILT_IN)}"
        )


def rendered(where: str, chat: Chat, tokenizer: Any) -> tuple[str, list[Span], int]:
    """A conversation as text, the places in it that the assistant wrote, and how many of its turns have no place.

    A turn of the assistant is what the template adds behind its own prompt for it; one with a ``weight`` of 0 is left
    out, as in OpenAI's format. A turn has no place where the template writes it in another way once others follow, as
    some do with turns that hold thoughts.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{where} holds a conversation, but the tokenizer has no chat template; give --chat-template, or plain text"
        )
    text = _render(where, chat, len(chat.messages), tokenizer, False)
    spans: list[Span] = []
    lost = 0
    for i, message in enumerate(chat.messages):
        if message.get("role") != "assistant" or i < chat.first or message.get("weight") == 0:
            continue
        before = _render(where, chat, i, tokenizer, False) if i else ""
        prompted = _render(where, chat, i, tokenizer, True) if i else ""
        through = text if i + 1 == len(chat.messages) else _render(where, chat, i + 1, tokenizer, False)
        # a prompt may go on with what a model is to write first, such as the mark of a thought: that is learned
        start = next((k for k, (a, b) in enumerate(zip(prompted, text, strict=False)) if a != b), len(prompted))
        if text.startswith(before) and text.startswith(through) and len(before) <= start < len(through):
            spans.append((start, len(through)))
        else:
            lost += 1
    return text, spans, lost


def _render(where: str, chat: Chat, turns: int, tokenizer: Any, prompts: bool) -> str:
    more = {} if chat.tools is None else {"tools": chat.tools}
    try:
        return str(
            tokenizer.apply_chat_template(
                list(chat.messages[:turns]), tokenize=False, add_generation_prompt=prompts, **more
            )
        )
    except Exception as error:  # templates run arbitrary code and raise whatever they like
        reason = re.sub(r"\s+", " ", str(error))
        raise DataError(f"{where}: the chat template refused these messages: {reason}") from error

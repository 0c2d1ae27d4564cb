"""Decides by the names of its fields what a record is: text, a prompt with its completion, or a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chunkft_fx.errors import DataError, OptionError
from chunkft_fx.tools.data.records import Part

# The fields by which each format is known; the first that a record has decides.
FORMATS = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
}
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
# What a field can be called otherwise in a data set: those above, and what goes with them.
FIELDS = ("text", *(name for names in FORMATS.values() for name in names), "input", "system", "tools")
# What Alpaca's own prompts say, for tokenizers without a chat template.
ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n"
)


@dataclass(frozen=True)
class Text:
    """Plain text, all of it learned: ``is_first`` and ``is_last`` say whether a document begins and ends with it."""

    text: str
    is_first: bool = True
    is_last: bool = True


@dataclass(frozen=True)
class Reply:
    """A prompt as it stands, and the completion that is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """A conversation as chat templates take it; of its turns the assistant's from ``first`` on are learned."""

    messages: Sequence[Mapping[str, Any]]
    tools: Any = None
    first: int = 0


Document = Text | Reply | Chat


def document(where: str, record: Any, field: str = "text", has_template: bool = False) -> Document:
    """What a record is; ``field`` is the name of plain text. Raises `DataError` for what has no known fields.

    ``has_template`` says that the tokenizer has a chat template: instructions are then written as conversations.
    """
    if isinstance(record, Part):
        return Text(str(record), record.is_first, record.is_last)
    if not isinstance(record, Mapping):
        raise DataError(f"{where} is {type(record).__name__}, not an object with fields; {_known(field)}")
    if record.get(field) is not None:
        return Text(_text(where, record, field))
    kind = next((k for k, names in FORMATS.items() if all(record.get(n) is not None for n in names)), None)
    if kind is None:
        raise DataError(f"{where} has the fields {', '.join(map(str, record)) or 'none'}; {_known(field)}")
    return {"chat": _chat, "sharegpt": _sharegpt, "alpaca": _alpaca, "prompt-completion": _reply}[kind](
        where, record, has_template
    )


def renamed(record: Any, columns: Mapping[str, str]) -> Any:
    """A record whose fields have the names of ``FIELDS``; ``columns`` says what the data calls them."""
    if not isinstance(record, Mapping):
        return record
    found = {name: record[own] for name, own in columns.items() if own in record}
    return {name: value for name, value in record.items() if name not in columns.values()} | found


def check_columns(columns: Mapping[str, Any]) -> None:
    """Raise `OptionError` for other names of fields that no format has."""
    for name, own in columns.items():
        if name not in FIELDS:
            raise OptionError(f"columns has {name}, which no format has; known are {', '.join(FIELDS)}")
        if not isinstance(own, str):
            raise OptionError(f"columns has {own!r} for {name}; give the name of a field")


def adjusted(chat: Chat, system: str, last_turn: bool) -> Chat:
    """A conversation that begins with a system message, and of which all turns or the last are learned."""
    first = chat.first
    if system and chat.messages[0].get("role") != "system":
        chat = replace(chat, messages=[{"role": "system", "content": system}, *chat.messages], first=first + 1)
    if not last_turn:
        return chat
    turns = [i for i, message in enumerate(chat.messages) if message.get("role") == "assistant"]
    return replace(chat, first=max([chat.first, *turns[-1:]]))


def _known(field: str) -> str:
    kinds = "; ".join(f"{kind}: {' and '.join(names)}" for kind, names in FORMATS.items())
    return f'known are {kinds}; text: "{field}" (another name: --field)'


def _text(where: str, record: Mapping[str, Any], field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise DataError(f'{where}: field "{field}" is {type(value).__name__}, not text')
    return value


def _turns(where: str, record: Mapping[str, Any], field: str, example: str) -> list[Mapping[str, Any]]:
    turns = record[field]
    is_list = isinstance(turns, Sequence) and not isinstance(turns, str)
    if not is_list or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f'{where}: "{field}" is not a list of objects such as {example}')
    # tables have all fields in all turns, and None where a turn has nothing
    return [{name: value for name, value in turn.items() if value is not None} for turn in turns]


def _chat(where: str, record: Mapping[str, Any], has_template: bool) -> Document:
    turns = _turns(where, record, "messages", '{"role": "user", "content": "..."}')
    if all("from" in turn for turn in turns):
        return _sharegpt(where, record, has_template, "messages")
    for i, turn in enumerate(turns, start=1):
        if "role" not in turn:
            raise DataError(f'{where}: turn {i} of "messages" has the fields {", ".join(turn) or "none"}, and no role')
        if "content" not in turn and "tool_calls" not in turn:
            raise DataError(f'{where}: turn {i} of "messages", of role {turn["role"]}, has no content')
    return Chat(turns, record.get("tools"))


def _sharegpt(where: str, record: Mapping[str, Any], has_template: bool, field: str = "conversations") -> Document:
    messages = []
    for turn in _turns(where, record, field, '{"from": "human", "value": "..."}'):
        speaker, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if speaker not in ROLES:
            raise DataError(f'{where}: a turn is from {speaker!r}; "from" must be one of {", ".join(ROLES)}')
        if not isinstance(value, str):
            raise DataError(f'{where}: the "value" of a turn is {type(value).__name__}, not text')
        messages.append({"role": ROLES[speaker], "content": value})
    return Chat(_with_system(where, record, messages), record.get("tools"))


def _with_system(where: str, record: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not record.get("system") or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": _text(where, record, "system")}, *messages]


def _alpaca(where: str, record: Mapping[str, Any], has_template: bool) -> Document:
    instruction, output = _text(where, record, "instruction"), _text(where, record, "output")
    given = _text(where, record, "input") if record.get("input") else ""
    if has_template:
        asked = f"{instruction}\n\n{given}" if given else instruction
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
        return Chat(_with_system(where, record, turns))
    paired = ", paired with an input that provides further context" if given else ""
    prompt = ALPACA.format(paired=paired, instruction=instruction, given=f"### Input:\n{given}\n\n" if given else "")
    return Reply(prompt, output)


def _reply(where: str, record: Mapping[str, Any], has_template: bool) -> Document:
    if isinstance(record["prompt"], str):
        return Reply(record["prompt"], _text(where, record, "completion"))
    asked, answered = (_turns(where, record, f, '{"role": "user", "content": "..."}') for f in ("prompt", "completion"))
    return Chat([*asked, *answered], record.get("tools"), first=len(asked))

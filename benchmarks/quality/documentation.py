"""Makes English text of a small shift out of the documentation of what is installed, tokenised for a model.

    python -m benchmarks.quality.documentation MODEL OUT.npz
    python -m benchmarks.quality.documentation MODEL OUT.npz --chat --length 512

The text is that of docstrings in Python's library and in packages that come with this library, and of its help topics.
The same installation gives the same text; each docstring counts once; whole files are held out. With ``--chat`` each
docstring is the answer to a question in the format of the model, whole chats fill sequences of ``--length`` tokens, and
only the tokens of answers, with the mark of their end, are labels.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import inspect
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from chunkft_fx.tools.load import load_tokenizer

PACKAGES = ("jinja2", "mpmath", "networkx", "numpy", "sympy", "torch", "transformers", "typer", "rich")
LEFT_OUT = {"test", "tests", "testing", "site-packages", "idle_test", "lib2to3", "__pycache__"}  # folders
SHORTEST, LONGEST = 80, 1500  # characters; a longer one ends with a paragraph before that
HELD_OUT = 10  # one file of that many
QUESTIONS = (
    "What does the {kind} `{name}` do?",
    "Explain the {kind} `{name}`.",
    "How is the {kind} `{name}` documented?",
    "I found the {kind} `{name}`. What is it for?",
)


@dataclass(frozen=True)
class Entry:
    """A docstring: whether its file is held out, what it is about, and its text."""

    is_held_out: bool
    kind: str
    name: str
    text: str


def is_held_out(file: str) -> bool:
    """Whether a file's entries are evaluated on; ``file`` is its path within an installation."""
    return int(hashlib.sha256(file.encode()).hexdigest(), 16) % HELD_OUT == 0


def shortened(text: str) -> str:
    """The first paragraphs of a docstring, as many as `LONGEST` allows, or the first lines of a single long one."""
    for separator in ("\n\n", "\n"):
        parts = text.split(separator)
        while len(parts) > 1 and len(text) > LONGEST:
            parts.pop()
            text = separator.join(parts).rstrip()
    return text[:LONGEST]


def docstrings(source: str, file: str, module: str) -> Iterator[Entry]:
    """Those of a module and of the classes and functions in it."""

    def visit(node: Any, name: str, kind: str) -> Iterator[Entry]:
        if text := ast.get_docstring(node):
            yield Entry(is_held_out(file), kind, name, shortened(inspect.cleandoc(text)))
        for child in node.body:
            if isinstance(child, ast.ClassDef):
                yield from visit(child, f"{name}.{child.name}", "class")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                what = "method" if kind == "class" else "function"
                yield from visit(child, f"{name}.{child.name}({ast.unparse(child.args)})", what)

    yield from visit(ast.parse(source), module, "module")


def files() -> Iterator[tuple[Path, str]]:
    """Python's library and the packages that are there: each file, and its path from their folder on."""
    library = Path(sysconfig.get_paths()["stdlib"])
    folders = [(library, library)]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        folders += [(Path(place), Path(place).parent) for place in (spec and spec.submodule_search_locations) or ()]
    for folder, base in folders:
        for path in sorted(folder.rglob("*.py")):
            relative = path.relative_to(base)
            if not LEFT_OUT & set(relative.parts):
                yield path, str(relative)


def entries() -> Iterator[Entry]:
    """All documentation of the installation, topics first."""
    for topic, text in sorted(topics.items()):
        yield Entry(is_held_out(f"topics/{topic}"), "topic", topic, shortened(text.strip()))
    for path, file in files():
        try:
            source = path.read_text(encoding="utf-8")
            found = list(docstrings(source, file, file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")))
        except (SyntaxError, UnicodeDecodeError):  # a template, or a test of the compiler
            continue
        yield from found


def distinct(found: Iterable[Entry]) -> list[Entry]:
    """Entries of at least `SHORTEST` characters, of equal texts the first; white space makes no difference."""
    seen: dict[str, Entry] = {}
    for entry in found:
        if len(entry.text) >= SHORTEST:
            seen.setdefault(" ".join(entry.text.split()).lower(), entry)
    return sorted(seen.values(), key=lambda e: hashlib.sha256(e.name.encode() + e.text.encode()).digest())


def plain(chosen: Sequence[Entry], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids of entries one after the other, an end token behind each; all of them count."""
    ids: list[int] = []
    for entry in chosen:
        ids += [*tokenizer.encode(f"{entry.name}\n\n{entry.text}", add_special_tokens=False), tokenizer.eos_token_id]
    return ids, [True] * len(ids)


def chats(chosen: Sequence[Entry], tokenizer: Any, length: int) -> tuple[list[int], list[bool]]:
    """Token ids of questions and answers in whole sequences of ``length``, and which belong to an answer."""
    ids: list[int] = []
    counts: list[bool] = []
    for entry in chosen:
        question, answer = (tokenizer.encode(part, add_special_tokens=False) for part in chat(entry, tokenizer))
        if len(question) >= length // 2:
            continue
        left = length - len(ids) % length
        if len(question) + len(answer) > left:
            ids += [tokenizer.eos_token_id] * left
            counts += [False] * left
            answer = answer[: length - len(question)]
        ids += question + answer
        counts += [False] * len(question) + [True] * len(answer)
    rest = -len(ids) % length
    return ids + [tokenizer.eos_token_id] * rest, counts + [False] * rest


def chat(entry: Entry, tokenizer: Any) -> tuple[str, str]:
    """What the model is shown, and what it is to answer, in the tokenizer's template."""
    number = int(hashlib.sha256(entry.name.encode()).hexdigest(), 16) % len(QUESTIONS)
    asked = {"role": "user", "content": QUESTIONS[number].format(kind=entry.kind, name=entry.name)}
    answered = {"role": "assistant", "content": entry.text}
    question: str = tokenizer.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
    whole: str = tokenizer.apply_chat_template([asked, answered], tokenize=False)
    if not whole.startswith(question):
        raise ValueError(
            "the model's chat template does not begin a chat with its question: no answer can be told apart"
        )
    return question, whole[len(question) :]


def main() -> None:
    """Write the arrays that `data.text_of` reads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model's folder, hub name or GGUF file")
    parser.add_argument("out", type=Path)
    parser.add_argument("--chat", action="store_true", help="questions and answers instead of plain text")
    parser.add_argument("--length", type=int, default=512, help="tokens in a sequence of chats")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    found = distinct(entries())
    arrays: dict[str, Any] = {}
    for key, held_out in (("train", False), ("val", True)):
        chosen = [entry for entry in found if entry.is_held_out == held_out]
        ids, counts = chats(chosen, tokenizer, args.length) if args.chat else plain(chosen, tokenizer)
        arrays[key], arrays[f"{key}_counts"] = np.array(ids, np.int32), np.array(counts, bool)
        print(f"{key}: {len(chosen)} entries, {len(ids)} tokens, {sum(counts)} of them labels")
    np.savez_compressed(args.out, **arrays)


if __name__ == "__main__":
    main()

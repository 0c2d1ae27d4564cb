"""``chunkft chat``: talk with a model on the command line, to see what it has learned."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer

from chunkft_fx.errors import OptionError
from chunkft_fx.tools.console import quiet, run_command
from chunkft_fx.tools.load import load_model, load_tokenizer, pick_device, pick_dtype
from chunkft_fx.tools.training.options import at_least

# What begins a new conversation, on a line of its own.
NEW = "/new"


def command(
    model: Annotated[str, typer.Argument(help="The --out folder of a run, a hub name or a .gguf file.")],
    system: Annotated[str, typer.Option(help="What the conversation begins with, for models with a template.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="How freely tokens are drawn; 0 takes the likeliest.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that have this share together.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Answer each line of input: as a conversation where the model has a chat template, else by going on with the line.

    A line "/new" begins anew. In a pipe nothing is printed but answers, each in full before the next line is read.
    """
    quiet()
    where = pick_device(device)
    number = pick_dtype(dtype, where)
    at_least("max_new_tokens", max_new_tokens, 1)
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise OptionError(f"temperature is {temperature} and top-p {top_p}; give 0 or more, and a share up to 1")
    tokenizer = load_tokenizer(model)
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if system and not has_template:
        raise OptionError(f"--system begins a conversation, and model {model!r} has no chat template; leave it out")
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    loaded = load_model(model, number, where).eval()
    torch.manual_seed(seed)
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    for line in _lines():
        if line == NEW:
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        inputs = _inputs(tokenizer, messages if has_template else None, line)
        answer = _answer(loaded, tokenizer, inputs.to(where), {"max_new_tokens": max_new_tokens, **drawn})
        messages.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    """Lines that are typed, with a mark in front of each, or read from a pipe; empty ones are left out."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        if is_terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _inputs(tokenizer: Any, messages: list[dict[str, str]] | None, line: str) -> Any:
    if messages is None:
        return tokenizer(line, return_tensors="pt")
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, inputs: Any, options: dict[str, Any]) -> str:
    """Write an answer token by token as it comes; returns it whole."""
    import transformers

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    tokens = model.generate(**given, **options, streamer=streamer, pad_token_id=pad)
    return str(tokenizer.decode(tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    run_command(command)

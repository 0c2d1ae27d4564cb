"""A program that tests kill: it forks a training run for each line it is given, after imports, which take longest.

A line is a JSON object: ``out`` is the folder, ``mode`` a key of `MODES`, ``fuse`` after how many calls that
change something on the disk (`CALLS`) the run kills itself, 0 for never. Each run says ``start PID``, ``step N`` after
every step, and ``end STATUS``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import chunkft_fx
from chunkft_fx.tools.data.stream import pack
from chunkft_fx.tools.training.checkpoint import newest_checkpoint
from chunkft_fx.tools.training.folder import claimed, save_model
from chunkft_fx.tools.training.loop import train
from chunkft_fx.tools.training.options import TrainOptions
from chunkft_fx.tools.zoo import tiny
from tests.support.tiny_text import character_tokenizer

STEPS = 8
CALLS = ("mkdir", "pwrite", "fsync", "replace", "unlink")
# What of compile and of a run differs: a chunk a step, or all parameters at the step or in the backward.
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "chunks": ({"chunks": 3, "order": "random", "interval": 1}, {}),
    "step": ({"coverage": "all"}, {}),
    "backward": ({"coverage": "all"}, {"update": "backward", "max_grad_norm": None, "accumulate": 2}),
    "remainder": ({"coverage": "all"}, {"update": "backward", "max_grad_norm": None, "master": "remainder"}),
    "8 bits": ({"coverage": "all"}, {"master": "remainder", "state_dtype": "8bit"}),
    "remainder at the step": ({"coverage": "all"}, {"master": "remainder"}),
}
TEXT = "the quick brown fox jumps over the lazy dog. " * 4


def say(what: str, value: object) -> None:
    os.write(1, f"{what} {value}\n".encode())


def light(fuse: int) -> None:
    """Have the process end before its ``fuse``-th call that changes something on the disk, from whichever thread."""
    left = [fuse]
    for name in CALLS:
        call = getattr(os, name)

        def counted(*arguments: Any, call: Any = call, **more: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **more)

        setattr(os, name, counted)


def run(out: Path, fuse: int, mode: str) -> None:
    """Train to the end, from the checkpoint in the folder if there is one."""
    light(fuse)
    compiling, training = MODES[mode]
    model, _ = tiny("llama", torch.bfloat16 if "master" in training else torch.float32, dropout=0.2)
    module = chunkft_fx.compile(model, "1GB", backend="eager", **compiling)
    options = TrainOptions(STEPS, 2, lr=1e-2, warmup=2, save_every=2, **training)
    with claimed(out, ""):
        resume = None if newest_checkpoint(out) is None else out
        text = pack([TEXT], character_tokenizer(), 16)
        tokenizer = character_tokenizer()
        told = {"on_step": lambda info: say("step", info.step), "tokenizer": tokenizer}
        train(module, text, options, out=out, resume=resume, **told)
        save_model(out, module, tokenizer)


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if not child:
            say("start", os.getpid())
            try:
                run(Path(task["out"]), task["fuse"], task["mode"])
            except BaseException as error:
                say("failed", repr(error))
                os._exit(1)
            os._exit(0)
        say("end", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()

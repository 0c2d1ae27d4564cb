"""``chunkft convert``: write a checkpoint as one that transformers' Trainer resumes with torch's own AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chunkft_fx.checkpoints.dense.export import export
from chunkft_fx.tools.console import quiet, run_command


def command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run: the newest there.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    batch_size: Annotated[int, typer.Option(help="Trainer's per_device_train_batch_size.")] = 1,
) -> None:
    """Write CHECKPOINT in the folder OUT as one that Trainer resumes from: resume_from_checkpoint=OUT.

    The other way needs no conversion: chunkft_fx.load reads a checkpoint of Trainer's.
    """
    quiet()
    step = export(checkpoint, out, batch_size)
    print(f"{out} is a checkpoint of transformers' Trainer behind step {step}")


if __name__ == "__main__":
    run_command(command)

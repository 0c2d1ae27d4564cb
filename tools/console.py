"""Runs the command-line programs: turns errors into one line and an exit code, and draws the progress bar."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from chunkft_fx.bytes import format_bytes
from chunkft_fx.errors import BudgetParseError, ChunkCountError, ChunkFTError, ChunkFTWarning, OptionError
from chunkft_fx.tools.training import signals
from chunkft_fx.tools.training.loop import StepInfo

# Where there is no terminal to draw a bar on, this many lines report a run.
LINES = 10
# What the programs need beyond the library, the extra "demo".
NEEDED = ("transformers", "gguf", "accelerate", "datasets")
# Errors about what was typed.
USAGE = (OptionError, BudgetParseError, ChunkCountError)


def run_app(program: Callable[[], Any]) -> None:
    """Run a typer app. What goes wrong ends in one line on stderr, without traceback.

    The exit code is 2 for an option that cannot be, 1 for anything else that is no defect of this library, and
    128 + signal for a program that was told to stop.
    """
    code = 1
    try:
        with signals.at_once(), _warnings_as_lines():
            program()
            return
    except signals.Stopped as stopped:
        _say(str(stopped))
        code = 128 + stopped.number
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        _say(f'error: {error.name} is not installed; run: pip install "chunkft-fx[demo]"')
    except ChunkFTError as error:
        _say(f"error: {error}")
        code = 2 if isinstance(error, USAGE) else 1
    except OSError as error:
        _say(f"error: {error}")
    except (MemoryError, torch.OutOfMemoryError) as error:
        _say(f"error: out of memory: {error}")
    sys.exit(code)


def _say(message: str) -> None:
    print(" ".join(message.split()), file=sys.stderr)


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Write warnings of this library like its errors; others as Python does."""
    usual = warnings.formatwarning

    def line(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> str:
        if issubclass(category, ChunkFTWarning):
            return f"warning: {' '.join(str(message).split())}\n"
        return usual(message, category, *where, **more)

    warnings.formatwarning = line
    try:
        yield
    finally:
        warnings.formatwarning = usual


def run_command(command: Callable[..., None]) -> None:
    """Run one command as a program of its own, for ``python -m``."""
    app = typer.Typer(add_completion=False)
    app.command()(command)
    run_app(app)


def quiet() -> None:
    """Keep the chatter of transformers and its loaders out of a program's output."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def progress(title: str, steps: int) -> Iterator[Callable[[StepInfo], None]]:
    """A progress bar with loss, tokens/s, active chunk and memory; plain lines where there is no terminal."""
    console = Console()
    if not console.is_terminal:
        yield lambda info: _line(info, steps)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[info]}"), console=console) as bar:
        task = bar.add_task(title, total=steps, info="compiling")
        yield lambda info: bar.update(task, completed=info.step, info=step_text(info))


def step_text(info: StepInfo) -> str:
    """One step as a line: its loss, tokens a second, active chunk, learning rate, and peak memory."""
    return (
        f"loss {info.loss:.3f}  {info.tokens_per_s:,.0f} tokens/s  chunk {info.chunk}  "
        f"lr {info.lr:.2e}  memory {format_bytes(info.peak_nbytes)}"
    )


def _line(info: StepInfo, steps: int) -> None:
    if info.step == 1 or info.step % max(1, steps // LINES) == 0 or info.step == steps:
        print(f"step {info.step}/{steps}  {step_text(info)}", flush=True)

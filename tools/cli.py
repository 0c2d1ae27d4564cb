"""Runs ``chunkft``: each program of this folder is a subcommand."""

from __future__ import annotations

import typer

from chunkft_fx.tools import console, demo, inspect, plan
from chunkft_fx.tools.models import chat
from chunkft_fx.tools.saved import convert
from chunkft_fx.tools.training import train

app = typer.Typer(help="Full-parameter fine-tuning inside a byte budget.", no_args_is_help=True, add_completion=False)
app.command("train")(train.command)
app.command("chat")(chat.command)
app.command("inspect")(inspect.command)
app.command("plan")(plan.command)
app.command("convert")(convert.command)
app.command("demo")(demo.command)


def main() -> None:
    """The entry point ``chunkft``."""
    console.run_app(app)


if __name__ == "__main__":
    main()

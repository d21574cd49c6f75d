"""The command line: `reformer-kernels`, or `python -m reformer_kernels`."""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperGroup

from reformer_kernels import _command
from reformer_kernels.benchmarks.machine import version_of
from reformer_kernels.cli.arguments import usage_error
from reformer_kernels.cli.bench import bench
from reformer_kernels.cli.generate import generate
from reformer_kernels.cli.info import info
from reformer_kernels.cli.inspect import inspect
from reformer_kernels.cli.recall import recall
from reformer_kernels.cli.train import train

__all__ = ["app", "main"]

TOO_LARGE = ("can't allocate memory", "Storage size calculation overflowed", "not enough memory")
"""What torch's errors say where a tensor has no room."""


class CommandLine(TyperGroup):
    """The commands; sizes that this machine has no memory for end each of them with the reason."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
                text in str(error) for text in TOO_LARGE
            ):
                reason = str(error).partition("\n")[0]
                raise usage_error(f"not enough memory ({reason}); give smaller sizes") from error
            raise


app = typer.Typer(
    cls=CommandLine,
    name="reformer-kernels",
    help="Kernels for the Reformer: see what runs here, how fast it is, and train a small model with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # wraps the docstrings to the terminal
)
app.command()(info)
app.add_typer(bench, name="bench")
app.command()(inspect)
app.command()(train)
app.command()(generate)
app.command()(recall)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"reformer-kernels {version_of('reformer-kernels') or '(not installed)'}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # letters that the encoding lacks become "?"
            stream.reconfigure(errors="replace")
    _command.begin()
    app(prog_name="reformer-kernels")

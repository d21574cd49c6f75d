"""The command line: `reformer-kernels`, or `python -m reformer_kernels`."""

from __future__ import annotations

from typing import Annotated

import typer

from reformer_kernels.benchmarks.machine import version_of
from reformer_kernels.cli.bench import bench
from reformer_kernels.cli.generate import generate
from reformer_kernels.cli.info import info
from reformer_kernels.cli.inspect import inspect
from reformer_kernels.cli.recall import recall
from reformer_kernels.cli.train import train

__all__ = ["app", "main"]

app = typer.Typer(
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
    app(prog_name="reformer-kernels")

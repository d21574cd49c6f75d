"""Checks of command-line arguments: each returns the value, or ends the command with the reason."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
import typer
from rich.console import Console

from reformer_kernels._backend import resolve_backend

BACKENDS = ("auto", "reference", "native", "triton")
INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as in a shell, so that a script sees that the work was cut off."""
MAX_THREADS = max(1024, os.cpu_count() or 1)
"""The most CPU threads: torch's libraries end the process where they get no memory for their threads."""
MAX_SEED = 2**63 - 1
"""The largest seed of torch's generators."""
FILE_WIDTH = 180
"""Columns of tables that are written to a file or a pipe."""

Number = TypeVar("Number", int, float)


def usage_error(message: str) -> typer.BadParameter:
    """An error to raise: its message is printed without a traceback, and the exit code is 2."""
    return typer.BadParameter(message)


def positive(name: str, value: Number, most: Number | None = None) -> Number:
    if not value > 0 or value == float("inf"):
        raise usage_error(f"{name} must be positive, got {value}")
    if most is not None and value > most:
        raise usage_error(f"{name} must be at most {most}, got {value}")
    return value


def integers(name: str, text: str, most: int | None = None) -> tuple[int, ...]:
    """Positive integers, at most `most`, separated by commas."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise usage_error(f"{name} must be positive integers separated by commas, got {text!r}") from None
    if any(value < 1 for value in values):
        raise usage_error(f"{name} must be positive integers separated by commas, got {text!r}")
    return tuple(dict.fromkeys(positive(name, value, most) for value in values))


def threads(count: int | None) -> int:
    """The number of CPU threads: what --threads gives, or torch's own number."""
    return torch.get_num_threads() if count is None else positive("--threads", count, MAX_THREADS)


def choice(name: str, value: str, accepted: Sequence[str]) -> str:
    if value not in accepted:
        raise usage_error(f"{name} must be one of {', '.join(accepted)}, got {value!r}")
    return value


def choices(name: str, text: str, accepted: Sequence[str]) -> tuple[str, ...]:
    """Accepted words separated by commas; "none", or an empty text, means no word."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if words in ([], ["none"]):
        return ()
    return tuple(dict.fromkeys(choice(name, word, accepted) for word in words))


def device(name: str) -> str:
    """The name of a device that torch finds."""
    try:
        parsed = torch.device(name)
    except RuntimeError:
        raise usage_error(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    if parsed.type not in ("cpu", "cuda"):
        raise usage_error(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise usage_error(
            f"--device {name}: torch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices; "
            "'reformer-kernels info' lists what runs here"
        )
    return name


def usable_backend(backend: str, device_name: str, dtype: torch.dtype) -> str:
    """The name of a back end that runs here on that device and dtype; "auto" stays "auto"."""
    choice("--backend", backend, BACKENDS)
    try:
        resolve_backend(backend, torch.device(device_name), dtype)
    except (RuntimeError, ValueError) as error:
        raise usage_error(f"--backend {backend}: {error}") from error
    return backend


def writable_file(name: str, path: Path | None) -> None:
    """Refuse, before minutes of work, a file that could not be written at the end."""
    if path is None:
        return
    if path.is_dir():
        raise usage_error(f"{name} must name a file, got the folder {path}")
    if not path.absolute().parent.is_dir():
        raise usage_error(f"{name}: the folder {path.absolute().parent} does not exist")


class Output(Console):
    """Standard output. Where its reader leaves (`train | head -1`), the work goes on and writes its files."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def new_console(most: int | None = None) -> Console:
    """Standard output, at most `most` columns wide, and never wider than the terminal.

    Where it is no terminal (a file, a pipe), it has `most` columns, or enough for every table.
    """
    console = Output()
    if not console.is_terminal:
        return Output(width=most or FILE_WIDTH)
    return console if most is None else Output(width=min(most, console.width))


def printable(data: bytes | str) -> str:
    """Text for a terminal, without control characters other than newlines and tabs."""
    text = data.decode("utf-8", errors="replace") if isinstance(data, bytes) else data
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )

"""Checks of command-line arguments: the value, or the end of the command with a reason and exit code 2."""

from __future__ import annotations

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

Number = TypeVar("Number", int, float)


def usage_error(message: str) -> typer.BadParameter:
    """To be raised: printed as the command's own message, exit code 2, no traceback."""
    return typer.BadParameter(message)


def positive(name: str, value: Number, most: Number | None = None) -> Number:
    if not value > 0 or value == float("inf"):
        raise usage_error(f"{name} must be positive, got {value}")
    if most is not None and value > most:
        raise usage_error(f"{name} must be at most {most}, got {value}")
    return value


def integers(name: str, text: str) -> tuple[int, ...]:
    """Positive integers separated by commas."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise usage_error(f"{name} must be positive integers separated by commas, got {text!r}") from None
    if any(value < 1 for value in values):
        raise usage_error(f"{name} must be positive integers separated by commas, got {text!r}")
    return tuple(dict.fromkeys(values))


def choice(name: str, value: str, accepted: Sequence[str]) -> str:
    if value not in accepted:
        raise usage_error(f"{name} must be one of {', '.join(accepted)}, got {value!r}")
    return value


def choices(name: str, text: str, accepted: Sequence[str]) -> tuple[str, ...]:
    """Words separated by commas, each accepted; "none" or nothing: no words."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if words in ([], ["none"]):
        return ()
    return tuple(dict.fromkeys(choice(name, word, accepted) for word in words))


def live_backend(backend: str, device: str, dtype: torch.dtype) -> str:
    """The name of a back end that runs here on that device and dtype; "auto" is left as it is."""
    choice("--backend", backend, BACKENDS)
    try:
        resolve_backend(backend, torch.device(device), dtype)
    except (RuntimeError, ValueError) as error:
        raise usage_error(f"--backend {backend}: {error}") from error
    return backend


def writable_file(name: str, path: Path | None) -> None:
    """Refuse early, before minutes of work, a file that could not be written at the end."""
    if path is None:
        return
    if path.is_dir():
        raise usage_error(f"{name} must name a file, got the folder {path}")
    if not path.absolute().parent.is_dir():
        raise usage_error(f"{name}: the folder {path.absolute().parent} does not exist")


def new_console() -> Console:
    """Standard output; where it is no terminal (a file, a pipe), wide enough for every column."""
    console = Console()
    return console if console.is_terminal else Console(width=180)


def printable(data: bytes | str) -> str:
    """Text for a terminal: no control characters but newlines and tabs."""
    text = data.decode("utf-8", errors="replace") if isinstance(data, bytes) else data
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )

"""The text that `reformer-kernels train` learns: a file, a folder, or the standard library's own source."""

from __future__ import annotations

import hashlib
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT_SHARE = 0.05
LIBRARY_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
FILE_ORDER_SEED = 0


class TextError(Exception):
    """A text that cannot be used for training; the message says why."""


@dataclass(frozen=True)
class Text:
    """Bytes for training and bytes held out for evaluation, uint8, and where they come from."""

    name: str
    train: Tensor
    held_out: Tensor
    sha256: str

    @property
    def size(self) -> int:
        return self.train.numel() + self.held_out.numel()


def load_text(path: Path | None, seq_len: int) -> Text:
    """Read a file, a folder (every text file below it) or, by default, Python's standard library.

    The last twentieth is held out, at least one window of seq_len + 1 bytes. A folder's files are joined in a
    fixed random order, so that what is held out is like the rest.

    Raises:
        TextError: the text is missing, unreadable, or too short for a window to train on and one to hold out.
    """
    if path is None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = [
            file
            for file in sorted(folder.rglob("*.py"))
            if not LIBRARY_LEFT_OUT & set(file.relative_to(folder).parts)
        ]
        name = f"Python's standard library, {folder}"
        data = _join(files)
    elif path.is_dir():
        every = [file for file in sorted(path.rglob("*")) if file.is_file()]
        files = [f for f in every if not any(part.startswith(".") for part in f.relative_to(path).parts)]
        name = str(path)
        data = _join(files)
    elif path.is_file():
        name = str(path)
        data = _read(path)
    else:
        raise TextError(f"{path} is neither a file nor a folder")

    window = seq_len + 1
    if not data:
        raise TextError(f"{name} holds no text")
    if len(data) < 2 * window:
        raise TextError(
            f"{name} has {len(data)} bytes; sequences of {seq_len} need at least {2 * window} "
            f"(a window to train on and one to hold out): give more text or a smaller --seq-len"
        )
    held = max(int(len(data) * HELD_OUT_SHARE), window)
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return Text(name, values[:-held], values[-held:], hashlib.sha256(data).hexdigest())


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise TextError(f"cannot read {file}: {error.strerror or error}") from error


def _join(files: list[Path]) -> bytes:
    """The contents of the text files among `files`, those without a zero byte."""
    files = list(files)
    random.Random(FILE_ORDER_SEED).shuffle(files)
    contents = (_read(file) for file in files)
    return b"\n".join(content for content in contents if content and b"\0" not in content)

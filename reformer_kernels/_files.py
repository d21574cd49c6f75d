"""Writing files so that nobody ever finds half of one."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

LEFT_OVER = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


def write_atomically(path: str | Path, data: str | bytes) -> None:
    """Writes `data` to `path`, which holds either what it held before or all of `data`, also after a crash.

    Text is written as UTF-8. Raises OSError where the file cannot be written; nothing is left beside it then.
    """
    write_together({path: data})


def write_together(files: Mapping[str | Path, str | bytes]) -> None:
    """Writes several files that belong together, each as `write_atomically` does.

    All data is on the disk before the first file is replaced, so a full disk leaves every file as it was.
    """
    pending: list[tuple[Path, Path]] = []
    with ExitStack() as opened:  # the files stay open, and so locked, until they have their names
        try:
            for name, data in files.items():
                path = Path(name)
                beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
                pending.append((beside, path))
                file = opened.enter_context(open(beside, "xb"))
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            for beside, path in pending:
                os.replace(beside, path)
        finally:
            for beside, _ in pending:
                beside.unlink(missing_ok=True)


def remove_left_over(folder: Path) -> None:
    """Remove what processes that were killed while they wrote left in `folder`.

    A writer holds a lock on its unfinished files, so those of one that still runs stay.
    """
    for path in folder.iterdir():
        if not LEFT_OVER.fullmatch(path.name):
            continue
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            path.unlink(missing_ok=True)

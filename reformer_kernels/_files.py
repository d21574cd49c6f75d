"""Writing files so that nobody ever finds half of one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path


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
    try:
        for name, data in files.items():
            path = Path(name)
            beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
            pending.append((beside, path))
            with open(beside, "xb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
        for beside, path in pending:
            os.replace(beside, path)
    finally:
        for beside, _ in pending:
            beside.unlink(missing_ok=True)

"""The commands never fork: a child of a process whose torch has run in parallel would hang in torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys
os.register_at_fork(before=lambda: print("forked", file=sys.stderr))
if sys.argv[1] == "fork":
    os.fork() or os._exit(0)
else:
    from reformer_kernels.cli import main
    main()
"""

TRAIN = [
    "train",
    "--steps",
    "2",
    "--seq-len",
    "64",
    "--dim",
    "16",
    "--heads",
    "2",
    str(Path(__file__).parent),
]
BENCH = ["bench", "lsh", "--seq-lens", "64", "--heads", "1", "--head-dim", "8", "--backward"]


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("arguments", [TRAIN, BENCH], ids=["train", "bench"])
def test_commands_do_not_fork(arguments: list[str], tmp_path: Path) -> None:
    done = run(arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "forked" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_fork_would_be_seen(tmp_path: Path) -> None:
    assert "forked" in run(["fork"], tmp_path).stderr

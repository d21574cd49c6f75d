"""The results of the Triton kernels in Triton's interpreter: runs triton_cases.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("group", ["hash", "attention", "whole"])
def test_interpreted(group: str) -> None:
    # In a process of its own, as the interpreter is chosen when triton is imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "python_tests.gpu.triton_cases", group],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("passed") == len(done.stdout.splitlines()) >= 2

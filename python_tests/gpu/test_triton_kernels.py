"""The Triton kernels in Triton's interpreter: runs triton_cases.py, grid_orders.py and broken_kernels.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "program",
    ["triton_cases hash", "triton_cases attention", "triton_cases whole", "grid_orders", "broken_kernels"],
)
def test_interpreted(program: str) -> None:
    # In a process of its own, as the interpreter is chosen when triton is imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *f"python_tests.gpu.{program}".split()],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("passed") == len(done.stdout.splitlines()) >= 2

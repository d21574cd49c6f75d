"""The Triton residual step: results in Triton's interpreter, and machine code with no GPU present."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

CASES = Path(__file__).with_name("triton_cases.py")


def test_interpreted() -> None:
    # In a process of its own, as the interpreter is chosen when triton is imported.
    root = str(CASES.parents[3])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(CASES)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["fixed_point", "passed", "flag", "passed", "normalised", "passed"]


@pytest.mark.parametrize(
    ("backend", "architecture", "warp"), [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)]
)
@pytest.mark.parametrize("fixed", [True, False])
def test_compiles(backend: str, architecture: int | str, warp: int, fixed: bool) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from reformer_kernels.ops.residual.triton import BLOCK, residual_step_kernel

    pointers = {"stream": "*i32" if fixed else "*bf16", "mean": "*fp32", "rstd": "*fp32", "weight": "*fp32"}
    pointers |= {"delta": "*bf16", "value": "*bf16", "normed": "*bf16", "bias": "*fp32"}
    numbers = {"scale": "*fp32", "flag": "*i32", "elements": "i64", "width": "i32", "epsilon": "fp32"}
    constants = {
        "SIGN": 1,
        "FIXED": fixed,
        "HAS_DELTA": True,
        "NORM": 1,
        "HAS_WEIGHT": True,
        "HAS_BIAS": True,
    }
    constants["BLOCK"] = BLOCK
    signature = pointers | numbers | dict.fromkeys(constants, "constexpr")
    ordered = {name: signature[name] for name in residual_step_kernel.arg_names}
    source = ASTSource(fn=residual_step_kernel, signature=ordered, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget(backend, architecture, warp))
    if backend == "cuda":
        assert "ld.global" in compiled.asm["ptx"]
        assert ".local" not in compiled.asm["ptx"], "registers spilled to local memory"
    else:
        assert compiled.asm["amdgcn"].count("ScratchSize: 0") >= 1

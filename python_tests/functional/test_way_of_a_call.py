"""The files that a call of `lsh_attention` passes on its way down to the C++ kernel."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import reformer_kernels
from reformer_kernels import LSHConfig
from reformer_kernels import functional as F
from reformer_kernels.testing import normal

PACKAGE = Path(reformer_kernels.__file__).parent


def test_the_way_to_the_attention_kernel() -> None:
    """Each file is below the one before it: checks, the resolved call, the operator, its kernel, pointers."""
    qk, v = (normal(1, 2, 256, 16, dtype=torch.float32, seed=n) for n in range(2))
    config = LSHConfig(causal=True)
    layout = F.lsh_layout(qk, config, seed=0)
    entered: list[str] = []
    reached: list[str] = []

    def profile(frame: FrameType, event: str, function: Any) -> None:
        if event == "call" and not reached:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(PACKAGE):
                entered.append(path.relative_to(PACKAGE).as_posix())
        elif event == "c_call" and getattr(function, "__name__", "") == "attention_forward":
            reached.append(function.__name__)

    sys.setprofile(profile)
    try:
        with torch.no_grad():
            F.lsh_attention(qk, v, config, layout=layout)
    finally:
        sys.setprofile(None)
    assert reached == ["attention_forward"]
    assert list(dict.fromkeys(entered)) == [
        "functional/attention.py",
        "_checks.py",
        "config.py",
        "call.py",
        "_backend.py",
        "_native.py",  # asked whether it is there
        "ops/attention/op.py",
        "ops/attention/native.py",
    ]

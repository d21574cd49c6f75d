"""Matrix products inside Triton kernels, and the constants of exponentials with base 2."""

from __future__ import annotations

import triton
import triton.language as tl

from reformer_kernels._backend import interpreted

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
"""Kernels compute exp(x) as exp2(x * LOG2E), which is one instruction, and log(x) as log2(x) * LN2."""

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """a [M, K] times b [K, N], in float32. PRECISION ("ieee" or "tf32") is for float32 operands."""
    if INTERPRETED:  # the interpreter would multiply the bits of bfloat16 operands as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)

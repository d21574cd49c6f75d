"""The Triton residual step against the reference, on the CPU: a program to run with TRITON_INTERPRET=1."""

from __future__ import annotations

import itertools

import torch

import reformer_kernels.ops.residual.op  # noqa: F401  registers the operators
from reformer_kernels._limits import KERNEL_DTYPES
from reformer_kernels.ops.residual import reference

residual_step = torch.ops.reformer_kernels.triton_residual_step


def hostile(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(shape)
    values.view(-1)[::7] = torch.round(values.view(-1)[::7] * 16) / 16 + 1 / 32
    return values.to(dtype)


def fixed_point() -> None:
    for shape, dtype, sign, bits in itertools.product(((3, 5), (1, 1300)), KERNEL_DTYPES, (1, -1), (24,)):
        scale = torch.tensor(2.0**bits)
        flags = torch.zeros(2, 1, dtype=torch.int32)
        ours = reference.fixed_point_encode(hostile(shape, dtype), scale, flags[1])
        theirs, delta = ours.clone(), hostile(shape, dtype)
        value = residual_step(ours, delta, sign, scale, flags[0], dtype, "none", None, None, 0.0)[0]
        reference.fixed_point_add_(theirs, delta, scale, sign, flags[1])
        assert torch.equal(ours, theirs), (shape, dtype, sign, bits)
        expected = reference.fixed_point_decode(theirs, scale, dtype)
        if dtype == torch.bfloat16:  # which the interpreter truncates
            assert ((value - expected).abs() <= 2**-7 * expected.abs()).all()
        else:
            assert torch.equal(value, expected)
        assert not flags.any()


def flag() -> None:
    for bad, start in itertools.product(
        (float("nan"), 2.0**31, -(2.0**30), 0.0), (0, 2**30 + 5, -(2**30) - 5)
    ):
        delta = torch.zeros(2053)
        delta[2050] = bad
        stream, overflow = torch.full((2053,), start, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        for sign in (1, -1):
            residual_step(
                stream, delta, sign, torch.tensor(1.0), overflow, torch.float32, "none", None, None, 0.0
            )
        assert torch.equal(stream, torch.full_like(stream, start))
        assert bool(overflow) == (not (abs(bad) < 2**31 and abs(start + bad) < 2**31)), (bad, start)


def normalised() -> None:
    for normalization, fixed, columns in itertools.product(("layer", "rms"), (True, False), (1, 33)):
        start, delta = torch.randn(2, 4, columns), torch.randn(2, 4, columns)
        weight, bias = torch.randn(2, columns)
        scale, overflow = (
            (torch.tensor(2.0**20), torch.zeros(1, dtype=torch.int32)) if fixed else (None, None)
        )
        stream = reference.fixed_point_encode(start, scale, overflow) if fixed else start.clone()
        value, normed, mean, rstd = residual_step(
            stream, delta, -1, scale, overflow, torch.float32, normalization, weight, bias, 1e-5
        )
        x = value if fixed else stream
        torch.testing.assert_close(x, start - delta, rtol=0, atol=2**-19 if fixed else 0)
        expected = reference.normalise(x.double(), normalization, weight.double(), bias.double(), 1e-5)
        torch.testing.assert_close(normed, expected.float(), rtol=1e-4, atol=1e-4)
        centre = x.mean(-1) if normalization == "layer" else torch.zeros(2, 4)
        torch.testing.assert_close(mean, centre, rtol=1e-5, atol=1e-6)
        assert rstd.isfinite().all()


if __name__ == "__main__":
    torch.manual_seed(0)
    for case in (fixed_point, flag, normalised):
        case()
        print(f"{case.__name__} passed")

"""Residual steps: the native kernel equals the reference to the last bit; fixed-point arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import reformer_kernels.ops.residual.op  # noqa: F401  registers the operators
from python_tests.native_tools import isa, runnable_isas, torch_threads
from reformer_kernels._limits import KERNEL_DTYPES
from reformer_kernels.ops.residual import reference

SHAPES = [(1,), (3, 5), (2, 7, 33), (4, 2049), (70, 600)]


@pytest.fixture(params=runnable_isas())
def each_isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with isa(request.param):
        yield


def hostile(shape: tuple[int, ...], dtype: torch.dtype, spread: float = 1.0) -> Tensor:
    """Random values, among them some that rounding ties, and zeros of both signs."""
    values = spread * torch.randn(shape)
    flat = values.view(-1)
    flat[::7] = torch.round(flat[::7] * 16) / 16 + 1 / 32
    flat[3::11] = 0.0
    flat[5::13] = -0.0
    return values.to(dtype)


def native(
    stream: Tensor, delta: Tensor | None, sign: int, scale: Tensor, flag: Tensor, dtype: torch.dtype
) -> Tensor:
    return torch.ops.reformer_kernels.native_residual_step(
        stream, delta, sign, scale, flag, dtype, "none", None, None, 0.0
    )[0]


def flags() -> tuple[Tensor, Tensor]:
    return torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_fixed_point_steps_equal_the_reference_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for delta_dtype, bits, sign in ((dtype, 20, 1), (torch.float32, 4, -1), (torch.bfloat16, 27, 1)):
        scale = torch.tensor(2.0**bits)
        ours_flag, theirs_flag = flags()
        ours = reference.fixed_point_encode(hostile(shape, dtype), scale, theirs_flag)
        theirs = ours.clone()
        delta = hostile(shape, delta_dtype)
        value = native(ours, delta, sign, scale, ours_flag, dtype)
        reference.fixed_point_add_(theirs, delta, scale, sign, theirs_flag)
        assert torch.equal(ours, theirs)
        assert torch.equal(value, reference.fixed_point_decode(theirs, scale, dtype))
        assert not ours_flag
        assert not theirs_flag
        assert torch.equal(native(ours, None, 1, scale, ours_flag, dtype), value)
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**31, -(2.0**31), 2.0**30], ids=str)
@pytest.mark.parametrize("index", [0, 17, 2052])
def test_flag_reports_each_bad_value(bad: float, index: int) -> None:
    for start in (0, 2**30 + 5, -(2**30) - 5):
        outcomes = []
        delta = torch.zeros(2053)
        delta[index] = bad
        for is_native in (True, False):
            stream = torch.full((2053,), start, dtype=torch.int32)
            flag = torch.zeros(1, dtype=torch.int32)
            scale = torch.tensor(1.0)
            for sign in (1, -1):
                if is_native:
                    native(stream, delta, sign, scale, flag, torch.float32)
                else:
                    reference.fixed_point_add_(stream, delta, scale, sign, flag)
            # Subtracting undoes adding, whatever the values.
            assert torch.equal(stream, torch.full_like(stream, start))
            outcomes.append(int(flag))
        expected = not (abs(bad) < 2**31 and abs(start + bad) < 2**31)
        assert outcomes == [expected] * 2, (start, outcomes)


def test_values_round_trip_within_half_a_step() -> None:
    values = 3 * torch.randn(1000, dtype=torch.float64)
    flag, _ = flags()
    scale = reference.automatic_scale(values)
    stream = reference.fixed_point_encode(values, scale, flag)
    error = reference.fixed_point_decode(stream, scale, torch.float64) - values
    assert error.abs().max() <= 0.5 / scale
    assert not flag


@pytest.mark.parametrize("largest", [1e-30, 1e-3, 1.0, 3.0, 4.0, 1e15])
def test_automatic_scale_leaves_headroom(largest: float) -> None:
    scale = reference.automatic_scale(torch.tensor([0.1 * largest, -largest]), torch.zeros(3))
    assert math.frexp(scale.item())[0] == 0.5
    room = 2.0**31 / (scale.item() * max(1.0, largest))
    assert 2**reference.HEADROOM_BITS <= room < 2 ** (reference.HEADROOM_BITS + 1)


def test_automatic_scale_of_nothing() -> None:
    for values in ((torch.zeros(4),), (torch.tensor([math.nan, 1.0]),), (torch.zeros(0), torch.zeros(0))):
        assert reference.automatic_scale(*values) == 2.0 ** (31 - reference.HEADROOM_BITS)


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("normalization", ["layer", "rms"])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_fused_normalisation(
    dtype: torch.dtype, fixed: bool, normalization: str, shape: tuple[int, ...]
) -> None:
    weight, bias = torch.randn(shape[-1]), torch.randn(shape[-1])
    delta = hostile(shape, dtype)
    scale, flag = (torch.tensor(2.0**16), torch.zeros(1, dtype=torch.int32)) if fixed else (None, None)
    start = hostile(shape, dtype)
    stream = reference.fixed_point_encode(start, scale, flag) if fixed else start.clone()
    value, normed, mean, rstd = torch.ops.reformer_kernels.native_residual_step(
        stream, delta, -1, scale, flag, dtype, normalization, weight, bias, 1e-5
    )
    if fixed:
        exact = reference.fixed_point_encode(start, scale, flag)
        reference.fixed_point_add_(exact, delta, scale, -1, flag)
        expected = reference.fixed_point_decode(exact, scale, dtype)
        assert torch.equal(value, expected)
    else:
        expected = start - delta
        assert torch.equal(stream, expected)
    # The rounding of the result, and the error of float32 before it.
    truth = reference.normalise(expected.double(), normalization, weight.double(), bias.double(), 1e-5)
    allowed = torch.finfo(dtype).eps * truth.abs() + 3e-6 * (1 + truth.abs())
    assert ((normed.double() - truth).abs() <= allowed).all()
    if normalization == "layer":
        torch.testing.assert_close(mean, expected.float().mean(-1), rtol=1e-5, atol=1e-6)
    else:
        assert not mean.any()
    assert rstd.shape == shape[:-1]


def test_the_same_bits_for_any_number_of_threads() -> None:
    results = []
    start, delta = torch.randn(2, 300, 257)
    for threads in (1, 2, 3):
        stream = start.clone()
        with torch_threads(threads):
            out = torch.ops.reformer_kernels.native_residual_step(
                stream, delta, 1, None, None, torch.float32, "layer", None, None, 1e-5
            )
        results.append([stream, *out])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_no_elements() -> None:
    flag, _ = flags()
    value = native(
        torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, 4), 1, torch.tensor(1.0), flag, torch.float32
    )
    assert value.shape == (0, 4)


def test_bad_arguments() -> None:
    step = torch.ops.reformer_kernels.native_residual_step
    x, s = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int32)
    scale, flag = torch.tensor(1.0), torch.zeros(1, dtype=torch.int32)
    rest = ("none", None, None, 0.0)
    with pytest.raises(ValueError, match="sign must be 1 or -1, got 2"):
        step(x, x, 2, None, None, torch.float32, *rest)
    with pytest.raises(ValueError, match="an int32 stream needs a scale and a flag"):
        step(s, x, 1, None, None, torch.float32, *rest)
    with pytest.raises(ValueError, match="no other stream has them"):
        step(x, x, 1, scale, flag, torch.float32, *rest)
    with pytest.raises(ValueError, match=r"delta must be \(2, 3\) as the stream, got \(3,\)"):
        step(s, x[0], 1, scale, flag, torch.float32, *rest)
    with pytest.raises(TypeError, match="of the dtype asked for"):
        step(x, x, 1, None, None, torch.bfloat16, *rest)
    with pytest.raises(TypeError, match="delta must be"):
        step(s, x.long(), 1, scale, flag, torch.float32, *rest)
    with pytest.raises(ValueError, match="stream must be contiguous"):
        step(s.t(), x.t(), 1, scale, flag, torch.float32, *rest)
    with pytest.raises(ValueError, match="normalization must be one of"):
        step(x, x, 1, None, None, torch.float32, "batch", None, None, 0.0)
    with pytest.raises(ValueError, match=r"norm_weight must have shape \(3,\)"):
        step(x, x, 1, None, None, torch.float32, "layer", torch.ones(2), None, 0.0)


def test_operator_passes_opcheck() -> None:
    scale, flag = torch.tensor(2.0), torch.zeros(1, dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.reformer_kernels.native_residual_step,
        (
            *(torch.ones(2, 3, dtype=torch.int32), torch.randn(2, 3), 1, scale, flag, torch.float32),
            *("layer", torch.ones(3), None, 1e-5),
        ),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )

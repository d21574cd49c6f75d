"""The native hash against the reference and against projections in float64."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from python_tests.native_tools import isa, poisoned_memory, runnable_isas, torch_threads
from reformer_kernels.config import automatic_factors
from reformer_kernels.ops.hash import op, reference
from reformer_kernels.testing import near_ties

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = runnable_isas()


def native_hash(
    x: Tensor, rotations: Tensor, factors: tuple[int, ...], padding: Tensor | None = None, span: int = 0
) -> Tensor:
    with poisoned_memory():
        return torch.ops.reformer_kernels.native_lsh_hash(x, rotations, factors, span, padding)


def assert_same_ids(x: Tensor, rotations: Tensor, factors: tuple[int, ...], padding: Tensor | None) -> None:
    got = native_hash(x, rotations, factors, padding)
    expected = reference.lsh_hash(x, rotations, factors, padding)
    differ = got != expected
    assert not (differ & ~near_ties(x, rotations, factors)).any()
    assert differ.float().mean() < 0.01 if differ.numel() > 1000 else True


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", [(2,), (6,), (64,), (256,), (32, 16), (8, 4, 2)])
def test_equals_reference(name: str, dtype: torch.dtype, factors: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 131, 24).to(dtype)
    rotations = torch.randn(3, 24, 2, sum(factors) // 2 + 3)
    padding = torch.rand(2, 131) < 0.2
    with isa(name):
        assert_same_ids(x, rotations, factors, padding)
        assert_same_ids(x, rotations[:1], factors, None)


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(0, 3),
    H=st.integers(1, 3),
    L=st.integers(0, 70),
    D=st.one_of(st.integers(1, 80), st.just(301)),
    R=st.integers(1, 3),
    factors=st.lists(st.integers(1, 9).map(lambda half: 2 * half), min_size=1, max_size=3).map(tuple),
    shared=st.booleans(),
    padded=st.booleans(),
    layout=st.sampled_from(["contiguous", "projection", "reversed stride", "gaps", "column", "expanded"]),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(ISAS or [""]),
    seed=st.integers(0, 2**31),
)
def test_shapes_and_strides_exactly(
    B, H, L, D, R, factors, shared, padded, layout, dtype, name, seed
) -> None:  # type: ignore[no-untyped-def]
    """Small integers project without rounding, so that every id must agree, ties included."""
    torch.manual_seed(seed)
    shape = {
        "contiguous": (B, H, L, D),
        "projection": (B, L, H, D),
        "reversed stride": (H, B, L, D),
        "gaps": (B, H, 2 * L, D + 5),
        "column": (B, H, D, L),
        "expanded": (B, 1, 1, D),
    }[layout]
    x = torch.randint(-2, 3, shape).to(dtype)
    if layout == "projection":
        x = x.transpose(1, 2)
    elif layout == "reversed stride":
        x = x.transpose(0, 1)
    elif layout == "gaps":
        x = x[:, :, ::2, 2 : 2 + D]
    elif layout == "column":
        x = x.transpose(2, 3)
    elif layout == "expanded":
        x = x.expand(B, H, L, D)
    rotations = torch.randint(-2, 3, (1 if shared else H, D, R, sum(factors) // 2 + 1)).float()
    padding = torch.rand(B, L) < 0.3 if padded else None
    with isa(name):
        got = native_hash(x, rotations, factors, padding)
    assert torch.equal(got, reference.lsh_hash(x, rotations, factors, padding))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_finite_bit_pattern_is_read_right(dtype: torch.dtype) -> None:
    """Ids of (x, 1) rotated by columns (1, -t): which thresholds t each stored value is above."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype) if dtype != torch.float32 else bits.view(torch.float16).float()
    x = values[values.isfinite()].reshape(1, 1, -1, 1)
    rotations = torch.ones(1, 1, 1, 1)
    for name in ISAS:
        with isa(name):
            for threshold in (0.0, 6e-8, -0.3):
                columns = torch.cat([rotations, torch.full((1, 1, 1, 1), -threshold)], dim=1)
                both = torch.cat([x, torch.ones_like(x)], dim=-1)
                got = native_hash(both, columns, (2,))
                exact = both[..., :1].double() - float(torch.tensor(threshold))
                assert torch.equal(got[0, 0, 0], (exact < 0).flatten().int())


@pytest.mark.parametrize("name", ISAS)
def test_hostile_values(name: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(1, 1, 64, 8)
    rotations = torch.randn(1, 8, 2, 12)
    factors = (16, 8)
    with isa(name):
        clean = native_hash(x, rotations, factors)
        hostile = x.clone()
        hostile[0, 0, 3, 2] = math.nan
        hostile[0, 0, 9, 0] = math.inf
        hostile[0, 0, 20, 7] = -math.inf
        hostile[0, 0, 33] = 3e38
        hostile[0, 0, 40] = 1e-42
        hostile[0, 0, 50] = 0.0
        got = native_hash(hostile, rotations, factors)
        for row in (3, 9, 20, 50):
            assert (got[..., row] == 0).all()
        assert ((got >= 0) & (got < 128)).all()
        # Denormals: the same direction as an ordinary row of equal entries, up to rounding of x itself.
        assert torch.equal(got[..., 40], native_hash(torch.ones(1, 1, 1, 8), rotations, factors)[..., 0])
        untouched = torch.ones(64, dtype=torch.bool)
        untouched[[3, 9, 20, 33, 40, 50]] = False
        assert torch.equal(got[..., untouched], clean[..., untouched])
        # In one round only: its columns overflow, the other round's do not.
        lopsided = rotations.clone()
        lopsided[:, :, 1, 0] = math.inf
        got = native_hash(x, lopsided, factors)
        assert torch.equal(got[:, :, 0], clean[:, :, 0])
        assert (got[:, :, 1] == 0).all()
        # A column that no factor uses counts for nothing.
        wide = torch.cat([rotations, torch.full((1, 8, 2, 1), math.nan)], dim=-1)
        assert torch.equal(native_hash(x, wide, factors), clean)
        # All equal: the lowest index of a tie, positive side first.
        tie = native_hash(torch.ones(1, 1, 5, 8), torch.ones(1, 8, 1, 8), (16,))
        assert (tie == 0).all()
        tie = native_hash(-torch.ones(1, 1, 5, 8), torch.ones(1, 8, 1, 8), (16,))
        assert (tie == 8).all()
        mixed = torch.ones(1, 8, 1, 8)
        mixed[..., 0] = -1
        assert (native_hash(torch.ones(1, 1, 5, 8), mixed, (16,)) == 1).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, 7.0])
def test_padding_gets_the_last_bucket_whatever_it_holds(value: float) -> None:
    x, rotations = torch.randn(2, 2, 40, 8), torch.randn(2, 8, 3, 6)
    padding = torch.zeros(2, 40, dtype=torch.bool)
    padding[0, 30:] = True
    padding[1, ::3] = True
    clean = native_hash(x, rotations, (12,))
    x = x.masked_fill(padding[:, None, :, None], value)
    got = native_hash(x, rotations, (12,), padding)
    assert torch.equal(got, clean.masked_fill(padding[:, None, None], 12))


@pytest.mark.parametrize("name", ISAS)
def test_a_row_alone_and_any_thread_count_give_the_same_bits(name: str) -> None:
    torch.manual_seed(2)
    x, rotations = torch.randn(2, 2, 203, 33), torch.randn(2, 33, 2, 20)
    with isa(name):
        whole = native_hash(x, rotations, (24, 16))
        for count in (1, 2, 3, 7):
            with torch_threads(count):
                assert torch.equal(native_hash(x, rotations, (24, 16)), whole)
        for row in (0, 1, 24, 100, 202):
            alone = native_hash(x[1:, :1, row : row + 1], rotations[:1], (24, 16))
            assert torch.equal(alone[0, 0, :, 0], whole[1, 0, :, row])


def test_instruction_sets_agree() -> None:
    torch.manual_seed(3)
    x, rotations, factors = torch.randn(1, 2, 500, 64), torch.randn(2, 64, 2, 24), (32, 16)
    ids = {}
    for name in ISAS:
        with isa(name):
            ids[name] = native_hash(x, rotations, factors)
    close = near_ties(x, rotations, factors)
    for name, got in ids.items():
        assert not ((got != ids["portable"]) & ~close).any(), name


@pytest.mark.parametrize("L", [1, 63, 64, 65, 5000, 40000])
def test_automatic_factors(L: int) -> None:
    x, rotations = torch.randint(-2, 3, (1, 1, L, 4)).float(), torch.randint(-2, 3, (1, 4, 1, 128)).float()
    got = native_hash(x, rotations, (), span=64)
    assert torch.equal(got, reference.lsh_hash(x, rotations, automatic_factors(L, 64), None))


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 0, 8), (1, 1, 3, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    B, H, L, D = shape
    got = native_hash(torch.randn(shape), torch.randn(H or 1, D, 2, 4), (8,))
    assert got.shape == (B, H, 2, L)
    assert got.dtype == torch.int32
    assert (got == 0).all()


def test_wrong_input_raises() -> None:
    x, rotations = torch.randn(1, 2, 5, 8), torch.randn(2, 8, 2, 4)
    with pytest.raises(ValueError, match=r"x must be \(B, H, L, D\)"):
        native_hash(x[0], rotations, (8,))
    with pytest.raises(ValueError, match="rotations must be"):
        native_hash(x, rotations[:, :7], (8,))
    with pytest.raises(ValueError, match="rotations must be"):
        native_hash(x, torch.cat([rotations, rotations]), (8,))
    with pytest.raises(ValueError, match="even"):
        native_hash(x, rotations, (7,))
    with pytest.raises(ValueError, match="even"):
        native_hash(x, rotations, (-8,))
    with pytest.raises(ValueError, match="need 8 rotation columns, got 4"):
        native_hash(x, rotations, (16,))
    with pytest.raises(ValueError, match="span"):
        native_hash(x, rotations, ())
    with pytest.raises(TypeError, match="x must be"):
        native_hash(x.double(), rotations, (8,))
    with pytest.raises(TypeError, match=r"rotations must be torch.float32"):
        native_hash(x, rotations.half(), (8,))
    with pytest.raises(ValueError, match="padding must have shape"):
        native_hash(x, rotations, (8,), torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"padding must be torch\.bool"):
        native_hash(x, rotations, (8,), torch.zeros(1, 5))
    with pytest.raises(ValueError, match="more than"):
        native_hash(torch.randn(1, 1, 2, 2), torch.randn(1, 2, 1, 400), (64,) * 6)


def test_operator_contract() -> None:
    x, rotations = torch.randn(1, 2, 30, 8, requires_grad=True), torch.randn(2, 8, 2, 128)
    operator = torch.ops.reformer_kernels.native_lsh_hash.default
    torch.library.opcheck(operator, (x, rotations, [8], 0, None))
    torch.library.opcheck(operator, (x, rotations, [], 16, torch.zeros(1, 30, dtype=torch.bool)))


def test_gradients_pass_by_without_a_warning() -> None:
    x = torch.randn(1, 1, 6, 4, requires_grad=True)
    rotations = torch.randn(1, 4, 1, 4, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = native_hash(x * 2, rotations, (8,))
        assert not ids.requires_grad
        (x * ids.float().sum()).sum().backward()
    assert rotations.grad is None


def test_compiles_with_a_symbolic_length() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    rotations = torch.randn(1, 8, 2, 128)

    @torch.compile(backend=counter, fullgraph=True)
    def double(x: Tensor) -> Tensor:
        return torch.ops.reformer_kernels.native_lsh_hash(x, rotations, [], 16, None) * 2

    for L in (40, 100, 333, 7000):
        x = torch.randn(1, 1, L, 8)
        assert torch.equal(double(x), 2 * op.lsh_hash(x, rotations, [], None, "native", span=16))
    assert counter.frame_count <= 2

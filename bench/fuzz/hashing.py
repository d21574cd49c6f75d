"""Fuzzed calls of hashing, sorting, layouts, rotations and residual steps, and how they are drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from bench.fuzz.problems import configurations
from bench.fuzz.values import (
    DTYPES,
    ISAS,
    KERNEL_DTYPES,
    STRIDES,
    VALUES,
    error,
    floats,
    head_dims,
    made,
    seeds,
    small_lengths,
    spoiled,
)
from reformer_kernels import Layout, LSHConfig
from reformer_kernels import functional as F
from reformer_kernels.config import automatic_factors
from reformer_kernels.ops.hash import reference as hash_reference
from reformer_kernels.ops.residual import reference as residual_reference
from reformer_kernels.testing import isa, near_ties, normal, torch_threads

FACTORS: tuple[tuple[int, ...], ...] = ((2,), (4,), (6,), (2, 4), (8, 2, 2), (64,), (34, 2))


@dataclass(frozen=True, kw_only=True)
class Hash:
    """A call of `lsh_hash` or of one of its operators."""

    function: str = "lsh_hash"
    B: int = 1
    H: int = 1
    L: int = 8
    D: int = 4
    R: int = 1
    factors: tuple[int, ...] = (4,)
    span: int = 0  # of an operator: automatic factors
    extra_columns: int = 0
    shared_rotation: bool = False
    mask: str = "none"
    values: str = "normal"
    strides: str = "dense"
    dtype: str = "float32"
    backend: str = "native"
    isa: str = "none"
    threads: int = 1
    seed: int = 0


def check_hash(case: Hash) -> None:
    shape = (case.B, case.H, case.L, case.D)
    strides = "dense" if case.values == "spoiled" else case.strides
    x = made(*shape, dtype=DTYPES[case.dtype], seed=case.seed, values=case.values, strides=strides)
    if case.values == "spoiled":
        x = spoiled(x, normal(*shape[:3], seed=case.seed % 2**31) > 0.5, case.seed)
    factors = case.factors or automatic_factors(case.L, case.span)
    width = sum(factors) // 2 + case.extra_columns
    rotations = made(
        1 if case.shared_rotation else case.H, case.D, case.R, width, dtype=torch.float32, seed=case.seed + 1
    )
    padding = None if case.mask == "none" else normal(case.B, case.L, seed=case.seed % 2**31) > 0.5
    with torch_threads(case.threads), isa(case.isa if case.backend == "native" else ISAS[-1]):
        if case.function == "lsh_hash":
            mask = padding
            if padding is not None and case.mask != "bool":
                mask = torch.zeros(padding.shape).masked_fill(padding, float(case.mask))
            ids = F.lsh_hash(x, rotations, case.factors, mask, case.backend)
        else:
            operator = getattr(torch.ops.reformer_kernels, case.function)
            ids = operator(x, rotations, case.factors, case.span, padding)
    expected = hash_reference.lsh_hash(x.double(), rotations, factors, padding)
    assert ids.dtype == torch.int32 and ids.shape == expected.shape
    unsure = near_ties(x.nan_to_num(0, 0, 0), rotations, factors)
    # Beyond float32 a projection may or may not be infinite, by the order of its sum.
    huge = x.double().abs().amax(-1) > 1e36
    unsure |= (huge & x.isfinite().all(-1))[:, :, None]
    if padding is not None:
        unsure &= ~padding[:, None, None]
    wrong = (ids != expected) & ~unsure
    assert not wrong.any(), (
        f"ids {ids[wrong][:5].tolist()}, expected {expected[wrong][:5].tolist()}, "
        f"at {wrong.nonzero()[:5].tolist()}"
    )
    assert bool(((ids >= 0) & (ids <= math.prod(factors))).all())


@st.composite
def hashes(draw: st.DrawFn, function: str) -> Hash:
    backend = function.partition("_")[0] if function != "lsh_hash" else draw(_back_ends)
    # Triton's products are of bfloat16 parts, and the parts of denormal numbers vanish.
    kinds = [kind for kind in VALUES if not (backend == "triton" and kind == "denormal")]
    automatic = function != "lsh_hash" and draw(st.booleans())
    case = Hash(
        function=function,
        B=draw(st.integers(0 if backend == "native" else 1, 2 if backend != "triton" else 1)),
        H=draw(st.integers(1, 3)),
        L=draw(small_lengths if backend != "triton" else st.integers(1, 17)),
        D=draw(head_dims if backend != "triton" else st.integers(1, 17)),
        R=draw(st.integers(1, 4 if backend != "triton" else 2)),
        factors=() if automatic else draw(st.sampled_from(FACTORS)),
        span=draw(st.integers(1, 80)) if automatic else 0,
        extra_columns=draw(st.integers(0, 2)),
        shared_rotation=draw(st.booleans()),
        mask=draw(st.sampled_from(["none", "bool", "-inf", "nan"])),
        values=draw(st.sampled_from(["normal", *kinds, "spoiled"])),
        strides=draw(st.sampled_from(STRIDES)),
        dtype=draw(floats if backend == "reference" else st.sampled_from(KERNEL_DTYPES)),
        backend=backend,
        isa=draw(st.sampled_from(ISAS)),
        threads=draw(st.sampled_from([1, 1, 2, 3])),
        seed=draw(seeds),
    )
    return case


_back_ends = st.sampled_from(["native", "native", "reference"])


@dataclass(frozen=True, kw_only=True)
class Sort:
    """A call of `bucket_sort`, or of one of its operators."""

    function: str = "bucket_sort"
    batch: tuple[int, ...] = ()
    L: int = 8
    n_buckets: int = 4
    starts_size: int = 5
    ids: str = "inside"  # or "any" within 64 (or 32) bits, or "equal"
    dtype: str = "int32"
    strides: str = "dense"
    backend: str = "native"
    threads: int = 1
    seed: int = 0


def check_sort(case: Sort) -> None:
    dtype = torch.int64 if case.dtype == "int64" else torch.int32
    limits, generator = torch.iinfo(dtype), torch.Generator().manual_seed(case.seed % 2**31)
    low, high = {"inside": (0, case.n_buckets), "equal": (case.n_buckets // 2, case.n_buckets // 2 + 1)}.get(
        case.ids, (limits.min, limits.max)
    )
    shape = (*case.batch, case.L)
    ids = torch.randint(low, high, shape, generator=generator, dtype=dtype)
    if case.strides == "columns" and ids.dim() > 1:
        ids = ids.mT.contiguous().mT
    elif case.strides == "gaps":
        ids = torch.stack([ids, torch.full_like(ids, limits.max)], dim=-1)[..., 0]
    kept = ids.clone()
    with torch_threads(case.threads):
        if case.function == "bucket_sort":
            order, starts = F.bucket_sort(ids, case.n_buckets, case.backend), None
        else:
            operator = getattr(torch.ops.reformer_kernels, case.function)
            order, starts = operator(ids, case.n_buckets, case.starts_size)
    assert torch.equal(ids, kept), "the ids were changed"
    assert order.dtype == torch.int32 and order.shape == ids.shape
    for n, row in enumerate(kept.reshape(math.prod(case.batch), case.L).tolist()):
        clamped = [min(max(x, 0), case.n_buckets - 1) for x in row]
        expected = sorted(range(case.L), key=lambda i, row=clamped: (row[i], i))  # type: ignore[misc]
        assert order.reshape(-1, case.L)[n].tolist() == expected
        if starts is not None:
            counted = [sum(x < b for x in clamped) for b in range(case.starts_size)]
            assert starts.reshape(-1, case.starts_size)[n].tolist() == counted


@st.composite
def sorts(draw: st.DrawFn, function: str) -> Sort:
    n_buckets = draw(st.one_of(st.integers(1, 9), st.sampled_from([64, 300, 2**16, 2**20])))
    if function != "bucket_sort":
        n_buckets = min(n_buckets, 300)
    return Sort(
        function=function,
        batch=draw(st.sampled_from([(), (1,), (3,), (0,), (2, 2), (2, 1, 3)])),
        L=draw(st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 200]))),
        n_buckets=n_buckets,
        starts_size=n_buckets + draw(st.integers(1, 4)),
        ids=draw(st.sampled_from(["inside", "inside", "any", "equal"])),
        dtype=draw(st.sampled_from(["int32", "int64"])) if function == "bucket_sort" else "int32",
        strides=draw(st.sampled_from(["dense", "columns", "gaps"])),
        backend=draw(_back_ends),
        threads=draw(st.sampled_from([1, 2, 3])),
        seed=draw(seeds),
    )


@dataclass(frozen=True, kw_only=True)
class Places:
    """A call of `lsh_layout`, or with `key_length` of `lsh_cross_layout`."""

    config: LSHConfig = field(default_factory=LSHConfig)
    B: int = 1
    H: int = 1
    L: int = 8
    key_length: int | None = None
    D: int = 4
    mask: str = "none"
    values: str = "normal"
    strides: str = "dense"
    dtype: str = "float32"
    backend: str = "native"
    isa: str = "none"
    seed: int = 0


def check_places(case: Places) -> None:
    """Each round is sorted by (bucket, position), in the reference's buckets where there is no near-tie."""
    dtype, config = DTYPES[case.dtype], case.config
    lengths = [case.L] + ([] if case.key_length is None else [case.key_length])
    tensors = [
        made(
            case.B,
            case.H,
            n,
            case.D,
            dtype=dtype,
            seed=case.seed + s,
            values=case.values,
            strides=case.strides,
        )
        for s, n in enumerate(lengths)
    ]
    padding = normal(case.B, lengths[-1], seed=case.seed % 2**31) > 0.5 if case.mask == "bool" else None
    options: dict[str, Any] = {"key_padding_mask": padding, "backend": case.backend, "seed": case.seed}
    with isa(case.isa if case.backend == "native" else ISAS[-1]):
        if case.key_length is None:
            layouts = [F.lsh_layout(tensors[0], config, **options)]
            hashed, factors = not config.is_short(case.L), config.factors(case.L)
        else:
            layouts = list(F.lsh_cross_layout(*tensors, config, **options))
            hashed = not config.sees_all_keys(case.key_length)
            factors = config.bucket_factors or automatic_factors(case.key_length, config.cross_span)
    rotations = F.sample_rotations(config, case.H, case.D, case.seed)
    for n, (layout, x) in enumerate(zip(layouts, tensors, strict=True)):
        buckets = _buckets_of(layout)
        if not hashed:
            assert layout.rounds == 1 and not buckets.any()
            continue
        own = padding if n == len(layouts) - 1 else None
        sizes = x.abs()
        if n == 1 and not config.causal:  # keys are hashed less their mean
            x = x.double()
            seen = torch.ones(case.B, lengths[1]) if own is None else (~own).double()
            read = x if own is None else x.masked_fill(own[:, None, :, None], 0)
            x = x - read.sum(2, keepdim=True) / seen.sum(1).clamp_min(1)[:, None, None, None]
            sizes = sizes + sizes.double().amax(2, keepdim=True)
        expected = hash_reference.lsh_hash(x.double(), rotations, factors, own)
        unsure = near_ties(x, rotations, factors, sizes)
        assert bool(((buckets == expected) | unsure).all()), "a token is in another bucket"


def _buckets_of(layout: Layout) -> Tensor:
    """(B, H, R, L): each token's bucket, once the layout is found to be one."""
    order, starts, L = layout.order.long(), layout.bucket_starts.long(), layout.length
    assert torch.equal(order.sort(-1).values, torch.arange(L).expand(order.shape)), "not a permutation"
    assert (
        not starts[..., 0].any() and bool((starts[..., -1] == L).all()) and bool((starts.diff() >= 0).all())
    )
    ranks = torch.arange(L).expand(order.shape).contiguous()
    by_rank = torch.searchsorted(starts.contiguous(), ranks, right=True) - 1
    assert bool(((by_rank * L + order).diff() > 0).all()), "not sorted by bucket and position"
    return torch.empty_like(by_rank).scatter_(-1, order, by_rank)


@st.composite
def places(draw: st.DrawFn, cross: bool) -> Places:
    backend = draw(_back_ends)
    return Places(
        config=draw(configurations()),
        B=draw(st.integers(1, 2)),
        H=draw(st.integers(1, 2)),
        L=draw(small_lengths),
        key_length=draw(small_lengths) if cross else None,
        D=draw(head_dims),
        mask=draw(st.sampled_from(["none", "bool"])),
        values=draw(st.sampled_from(["normal", *VALUES])),
        strides=draw(st.sampled_from(STRIDES)),
        dtype=draw(floats if backend == "reference" else st.sampled_from(KERNEL_DTYPES)),
        backend=backend,
        isa=draw(st.sampled_from(ISAS)),
        seed=draw(seeds),
    )


@dataclass(frozen=True, kw_only=True)
class Rotations:
    """A call of `sample_rotations`, or of one of its operators."""

    function: str = "sample_rotations"
    config: LSHConfig = field(default_factory=LSHConfig)
    heads: int = 1
    head_dim: int = 4
    shared: bool = False
    seed: int = 0


def check_rotations(case: Rotations) -> None:
    """The same for the same seed, given either way, whatever torch's generator holds; and normal."""
    config, heads = case.config, 1 if case.shared else case.heads
    width, signed = config.rotation_width, case.seed - 2**64 * (case.seed >= 2**63)
    drawn = F.sample_rotations(config, case.heads, case.head_dim, case.seed, shared_heads=case.shared)
    torch.randn(1)
    if case.function != "sample_rotations":
        operator = getattr(torch.ops.reformer_kernels, case.function)
        again = operator(torch.tensor(signed), heads, case.head_dim, config.n_hashes, width)
    else:
        again = F.sample_rotations(
            config, case.heads, case.head_dim, torch.tensor([signed]), shared_heads=case.shared
        )
    assert drawn.dtype == torch.float32 and drawn.shape == (heads, case.head_dim, config.n_hashes, width)
    assert torch.equal(drawn, again), "another result for the same seed"
    other = F.sample_rotations(config, case.heads, case.head_dim, signed ^ 1, shared_heads=case.shared)
    assert not torch.equal(drawn, other), "the same result for another seed"
    n = drawn.numel()
    assert bool(drawn.isfinite().all()) and float(drawn.abs().max()) < 8
    assert abs(float(drawn.mean())) < 7 / n**0.5, "the mean of normal numbers"
    assert abs(float(drawn.square().mean()) - 1) < 7 * (2 / n) ** 0.5 + 20 / n, "their variance"


@st.composite
def rotations(draw: st.DrawFn, function: str) -> Rotations:
    return Rotations(
        function=function,
        config=draw(configurations()),
        heads=draw(st.integers(1, 4)),
        head_dim=draw(head_dims),
        shared=draw(st.booleans()),
        seed=draw(seeds),
    )


@dataclass(frozen=True, kw_only=True)
class Residual:
    """A call of an operator of residual steps. `bits` is the scale's exponent of a fixed-point stream."""

    operator: str = "native_residual_step"
    shape: tuple[int, ...] = (4,)
    bits: int | None = None
    sign: int = 1
    delta: str | None = "float32"
    values: str = "normal"
    strides: str = "dense"
    dtype: str = "float32"
    normalization: str = "none"
    affine: str = "none"  # or "weight" or "both"
    isa: str = "none"
    threads: int = 1
    seed: int = 0


def check_residual(case: Residual) -> None:
    dtype, ref = DTYPES[case.dtype], residual_reference
    start = made(*case.shape, dtype=dtype, seed=case.seed, values=case.values)
    delta = None
    if case.delta is not None:
        kind = "normal" if case.values == "spoiled" else case.values
        delta = made(
            *case.shape, dtype=DTYPES[case.delta], seed=case.seed + 1, values=kind, strides=case.strides
        )
        if case.values == "spoiled":
            delta = spoiled(delta, normal(*case.shape[:-1], seed=case.seed % 2**31) > 0.5, case.seed)
    flags = torch.zeros(2, 1, dtype=torch.int32)
    scale = None if case.bits is None else torch.tensor(2.0**case.bits)
    if scale is None:
        ours, theirs = start.clone(), start.clone()
        if delta is not None:
            # As Tensor.add_ does: in float32, rounded once.
            theirs = (theirs.float() + case.sign * delta.float()).to(dtype)
        value = theirs
    else:
        theirs = ref.fixed_point_encode(start.nan_to_num(), scale, torch.zeros(1, dtype=torch.int32))
        ours = theirs.clone()
        if delta is not None:
            ref.fixed_point_add_(theirs, delta, scale, case.sign, flags[1])
        value = ref.fixed_point_decode(theirs, scale, dtype)
    columns = case.shape[-1]
    weight = normal(columns, dtype=torch.float32, seed=5) if case.affine != "none" else None
    bias = normal(columns, dtype=torch.float32, seed=6) if case.affine == "both" else None
    operator = getattr(torch.ops.reformer_kernels, case.operator)
    with torch_threads(case.threads), isa(case.isa):
        found = operator(
            ours, delta, case.sign, scale, None if scale is None else flags[0], dtype, case.normalization,
            weight, bias, 1e-5,
        )  # fmt: skip
    assert bool(flags[0]) == bool(flags[1]), "the flag of overflow"
    truncated = case.operator.startswith("triton") and case.dtype == "bfloat16"  # as its interpreter rounds
    if truncated:
        assert error(ours, theirs) <= 2**-7 if scale is None else torch.equal(ours, theirs)
        value = ours if scale is None else found[0]
    else:
        assert torch.equal(ours.double().nan_to_num(), theirs.double().nan_to_num()), "the stream"
        if scale is not None:
            assert torch.equal(found[0], value), "the stream's value"
    if case.normalization == "none":
        return
    normed = ref.normalise(
        value.double(), case.normalization, *(None if p is None else p.double() for p in (weight, bias)), 1e-5
    )
    rows = value.double().isfinite().all(-1) & (value.double().abs().amax(-1) < 1e18)
    limit = {"float32": 2e-4, "bfloat16": 1.6e-2, "float16": 2e-3}[case.dtype]
    assert error(found[1][rows], normed[rows], 0.1) <= limit, "the normalised stream"
    assert bool(found[2][rows].isfinite().all()) and bool(found[3][rows].isfinite().all())


@st.composite
def residuals(draw: st.DrawFn, operator: str) -> Residual:
    columns = draw(st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 33, 64, 100, 300])))
    return Residual(
        operator=operator,
        shape=(*draw(st.sampled_from([(), (1,), (3,), (2, 5)])), columns),
        bits=draw(st.sampled_from([None, -3, 0, 12, 20, 30])),
        sign=draw(st.sampled_from([1, -1])),
        delta=draw(st.sampled_from([None, *KERNEL_DTYPES])),
        values=draw(st.sampled_from(["normal", *(v for v in VALUES if v != "denormal"), "spoiled"])),
        strides=draw(st.sampled_from(STRIDES)) if operator.startswith("native") else "dense",
        dtype=draw(st.sampled_from(KERNEL_DTYPES)),
        normalization=draw(st.sampled_from(["none", "layer", "rms"])),
        affine=draw(st.sampled_from(["none", "weight", "both"])),
        isa=draw(st.sampled_from(ISAS)),
        threads=draw(st.sampled_from([1, 2, 3])),
        seed=draw(seeds),
    )

"""Angular hashing on the GPU: rotation and argmax in one kernel.

A program takes the `rows` of its tile, tokens of one head in one round, and walks the columns of the rotation
in blocks of `keys`. It keeps only the best column so far for each token, so that projections never reach
memory.

A float32 has 24 bits and a bfloat16 has 8, so any float32 is the sum of three bfloat16 numbers. Tensor cores
multiply those without rounding, and so project as exactly as float32 arithmetic, where TF32 would move ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from reformer_kernels._limits import MAX_HEAD_DIM
from reformer_kernels.config import AUTOMATIC_ROTATION_WIDTH, automatic_factors
from reformer_kernels.gpu.architectures import architecture_of
from reformer_kernels.gpu.cost_model import Shape
from reformer_kernels.gpu.dot import dot
from reformer_kernels.gpu.launching import alignment, check_programs, check_rows, on_device, row_strides
from reformer_kernels.gpu.recording import recording
from reformer_kernels.gpu.specializations import TRITON_TYPES, Launched, Specialization
from reformer_kernels.gpu.tiles import Tile, tile
from reformer_kernels.ops.hash import triton_rotations

KERNEL = "lsh_hash"
"""What the table of tiles calls the kernel."""

FACTORS_A_LAUNCH = 4
"""The most bucket factors of one launch, which is as many as automatic factors have."""

_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""How many bfloat16 numbers each dtype splits into."""

_PRODUCTS = {1: 3, 2: 5, 3: 6}
"""How many products of bfloat16 numbers `_product` computes, by parts."""

_INTEGERS = (
    *("batch_stride", "head_stride", "row_stride", "rotation_head_stride", "rotation_stride", "width"),
    *("H", "L", "R", "factors", "factor0", "factor1", "factor2", "factor3", "column", "id_stride"),
)


@triton.jit
def _load_columns(  # type: ignore[no-untyped-def]
    x, rotation, d0, columns, row_valid, column_valid, row_offsets, rotation_stride,
    D: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Dimensions [d0, d0 + DIMS) of the rows [ROWS, DIMS] and of the rotation's columns [DIMS, COLUMNS]."""
    d = d0 + tl.arange(0, DIMS)
    a = tl.load(x + row_offsets[:, None] + d[None, :], row_valid[:, None] & (d < D)[None, :], other=0.0)
    b = tl.load(
        rotation + d[:, None] * rotation_stride + columns[None, :],
        (d < D)[:, None] & column_valid[None, :],
        other=0.0,
    )
    return a, b


@triton.jit
def _leading_bits(x):  # type: ignore[no-untyped-def]
    """x cut to the bits that a bfloat16 holds. The rest, x - result, is exact."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _product(a, b, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """a [M, K], whose numbers are sums of PARTS bfloat16 numbers, times b [K, N] float32, in float32.

    Products of parts that are below the last bit of a float32 are left out.
    """
    b1 = _leading_bits(b)
    b2 = _leading_bits(b - b1)
    b3 = (b - b1 - b2).to(tl.bfloat16)
    b1, b2 = b1.to(tl.bfloat16), b2.to(tl.bfloat16)
    if PARTS == 1:
        return dot(a, b3, "ieee") + dot(a, b2, "ieee") + dot(a, b1, "ieee")
    a = a.to(tl.float32)
    a1 = _leading_bits(a)
    a2 = _leading_bits(a - a1)
    low = dot(a2.to(tl.bfloat16), b2, "ieee")
    if PARTS == 3:
        low += dot((a - a1 - a2).to(tl.bfloat16), b1, "ieee")
    a1 = a1.to(tl.bfloat16)
    low += dot(a1, b3, "ieee")
    return low + dot(a2.to(tl.bfloat16), b1, "ieee") + dot(a1, b2, "ieee") + dot(a1, b1, "ieee")


@triton.jit(do_not_specialize=_INTEGERS)
def lsh_hash_kernel(  # type: ignore[no-untyped-def]
    x,
    rotations,
    padding,
    buckets,
    batch_stride,
    head_stride,
    row_stride,
    rotation_head_stride,
    rotation_stride,
    width,
    H,
    L,
    R,
    factors,
    factor0,
    factor1,
    factor2,
    factor3,
    column,
    id_stride,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIMS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """id = sum_k stride_k * argmax([x R_k; -x R_k]) over the `factors` factors of this launch.

    The FIRST launch starts ids at 0 and later ones add to them. Between launches, -1 marks rows that are not
    finite. The LAST launch gives those the id 0, and padding the id after the last bucket.
    """
    program = tl.program_id(0)
    round_ = program % R
    program = program // R
    tiles = tl.cdiv(L, ROWS)
    head = (program // tiles).to(tl.int64)
    row = (program % tiles) * ROWS + tl.arange(0, ROWS)
    valid = row < L
    batch = head // H
    # Strides are multiplied by ALIGN here, so that the compiler knows that it can load whole vectors.
    row_offsets = row.to(tl.int64) * ((row_stride // ALIGN).to(tl.int64) * ALIGN)
    x += batch * ((batch_stride // ALIGN).to(tl.int64) * ALIGN)
    x += (head % H) * ((head_stride // ALIGN).to(tl.int64) * ALIGN)
    rotation = rotations + (head % H) * rotation_head_stride + round_.to(tl.int64) * width
    rotation_stride = rotation_stride.to(tl.int64)
    out = buckets + (head * R + round_) * L + row

    ids = tl.zeros([ROWS], tl.int32)
    not_finite = tl.zeros([ROWS], tl.int32)
    if not FIRST:
        ids = tl.load(out, valid, other=0)
        not_finite = (ids < 0).to(tl.int32)
    for n in range(factors):
        factor = tl.where(n == 0, factor0, tl.where(n == 1, factor1, tl.where(n == 2, factor2, factor3)))
        half = factor // 2
        high = tl.full([ROWS], float("-inf"), tl.float32)  # the largest projection of x so far
        low = tl.full([ROWS], float("-inf"), tl.float32)  # and of -x
        high_index = tl.zeros([ROWS], tl.int32)
        low_index = tl.zeros([ROWS], tl.int32)
        for c0 in range(0, half, COLUMNS):
            c = c0 + tl.arange(0, COLUMNS)
            column_valid = c < half
            projected = tl.zeros([ROWS, COLUMNS], tl.float32)
            for d0 in tl.static_range(0, D, DIMS):
                a, b = _load_columns(
                    x, rotation, d0, column + c, valid, column_valid, row_offsets, rotation_stride, D, DIMS
                )
                projected += _product(a, b, PARTS)
            infinite = (tl.abs(projected) < float("inf")) == 0
            not_finite = tl.maximum(not_finite, tl.max(infinite.to(tl.int32), 1))
            projected = tl.where(infinite, 0.0, projected)
            masked = tl.where(column_valid[None, :], projected, float("-inf"))
            best, index = tl.max(masked, 1, return_indices=True)  # the first of equal ones
            high_index = tl.where(best > high, c0 + index, high_index)
            high = tl.maximum(best, high)
            masked = tl.where(column_valid[None, :], -projected, float("-inf"))
            best, index = tl.max(masked, 1, return_indices=True)
            low_index = tl.where(best > low, c0 + index, low_index)
            low = tl.maximum(best, low)
        ids += id_stride * tl.where(low > high, half + low_index, high_index)
        id_stride *= factor
        column += half
    if LAST:
        ids = tl.where(not_finite != 0, 0, ids)
        if HAS_PADDING:
            pad = tl.load(padding + batch * L + row, valid, other=0)
            ids = tl.where(pad != 0, id_stride, ids)
    else:
        ids = tl.where(not_finite != 0, -1, ids)
    tl.store(out, ids, valid)


def lsh_hash(
    x: Tensor,
    rotations: Tensor | None,
    factors: Sequence[int],
    padding: Tensor | None,
    seed: Tensor | None,
    rounds: int,
) -> Tensor:
    """Bucket ids (B, H, R, L) int32. The arguments are those of `reference.lsh_hash`, checked, on one device.

    Without rotations those of `rounds` rounds are drawn from the seed.

    Raises ValueError for rows that a kernel cannot read, a head dimension above 256 or too large a grid.
    """
    B, H, L, D = x.shape
    R = rounds if rotations is None else rotations.size(2)
    check_rows([("x", x)])
    buckets = torch.empty((B, H, R, L), dtype=torch.int32, device=x.device)
    if not buckets.numel():
        return buckets
    if D > MAX_HEAD_DIM:
        raise ValueError(f"x's last dimension must be in 1..{MAX_HEAD_DIM}, got {D}")
    if rotations is None:
        assert seed is not None
        rotations = x.new_empty((H, D, R, sum(factors) // 2), dtype=torch.float32)
        triton_rotations.sample_rotations(seed, rotations)
    width = rotations.size(3)
    chosen = tile(KERNEL, architecture=architecture_of(x.device), bits=8 * x.element_size(), head_dim=D)
    programs = check_programs(B * H * R * triton.cdiv(L, chosen.rows))
    column, id_stride = 0, 1
    with on_device(x):
        for first in range(0, len(factors), FACTORS_A_LAUNCH):
            launch_factors = factors[first : first + FACTORS_A_LAUNCH]
            lsh_hash_kernel[(programs,)](
                x,
                rotations,
                buckets if padding is None else padding.contiguous().view(torch.uint8),
                buckets,
                *row_strides(x),
                D * R * width if rotations.size(0) > 1 else 0,
                R * width,
                width,
                H,
                L,
                R,
                len(launch_factors),
                *launch_factors,
                *[2] * (FACTORS_A_LAUNCH - len(launch_factors)),
                column,
                id_stride,
                FIRST=first == 0,
                LAST=first + FACTORS_A_LAUNCH >= len(factors),
                HAS_PADDING=padding is not None,
                D=D,
                ALIGN=alignment(x),
                PARTS=_PARTS[x.dtype],
                **_tile_arguments(chosen),
                num_warps=chosen.warps,
                num_stages=chosen.stages,
            )
            column += sum(launch_factors) // 2
            id_stride *= math.prod(launch_factors)
    return buckets


def _tile_arguments(chosen: Tile) -> dict[str, int]:
    return {"ROWS": chosen.rows, "COLUMNS": chosen.keys, "DIMS": chosen.dims}


def launches(architecture: str, shape: Shape, dtype: torch.dtype) -> list[Launched]:
    """What `lsh_hash` launches for automatic buckets of tokens without padding, rotations given."""
    x = torch.empty((1, shape.heads, shape.length, shape.head_dim), dtype=dtype, device="meta")
    size = (shape.heads, shape.head_dim, shape.n_hashes, AUTOMATIC_ROTATION_WIDTH)
    rotations = torch.empty(size, dtype=torch.float32, device="meta")
    with recording(architecture) as recorded:
        lsh_hash(x, rotations, automatic_factors(shape.length, shape.chunk_length), None, None, 0)
    return [
        Launched(
            one.specialization(
                architecture=architecture,
                dtype=dtype,
                head_dim=shape.head_dim,
                options="off",
                tile_names=("ROWS", "COLUMNS", "DIMS"),
                products=_PRODUCTS[_PARTS[dtype]],
            ),
            one.programs,
        )
        for one in recorded
    ]


def specializations(
    *, architecture: str, dtype: torch.dtype, head_dim: int, options: str, tiles: Mapping[str, Tile]
) -> list[Specialization]:
    """The kernels for tensors of `dtype` and `head_dim`: see `gpu.specializations`.

    With options "off" the hash is the only launch of a call, with "all" the last of several, with padding.
    """
    bits = 8 * dtype.itemsize
    chosen = tiles.get(KERNEL) or tile(KERNEL, architecture=architecture, bits=bits, head_dim=head_dim)
    everything = options == "all"
    pointers = {"x": "*" + TRITON_TYPES[dtype], "rotations": "*fp32", "padding": "*u8", "buckets": "*i32"}
    return [
        Specialization(
            kernel=lsh_hash_kernel,
            name=KERNEL,
            signature=pointers | dict.fromkeys(_INTEGERS, "i32"),
            constexprs={
                "FIRST": not everything,
                "LAST": True,
                "HAS_PADDING": everything,
                "D": head_dim,
                "ALIGN": 128 // bits,
                "PARTS": _PARTS[dtype],
                **_tile_arguments(chosen),
            },
            tile=chosen,
            architecture=architecture,
            dtype=dtype,
            head_dim=head_dim,
            options=options,
            divisible=tuple(pointers),
            products=_PRODUCTS[_PARTS[dtype]],
        ),
        triton_rotations.specialization(
            architecture=architecture, dtype=dtype, head_dim=head_dim, options=options
        ),
    ]

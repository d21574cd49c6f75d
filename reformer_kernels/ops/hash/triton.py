"""Angular hashing on the GPU: rotation and argmax in one kernel.

A program takes `rows` tokens of one head in one round and walks the columns of the rotation in blocks of
`keys`, keeping for each token only the best column so far: the projections never reach memory.

A float32 has 24 bits, a bfloat16 eight: any float32 is the sum of three bfloat16 numbers. So tensor cores,
which multiply those without rounding, project as exactly as float32 arithmetic (TF32 would move ids).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from reformer_kernels.gpu.launching import alignment, check_programs, check_rows, dot, on_device, row_strides
from reformer_kernels.gpu.specialization import TRITON_TYPES, Specialization
from reformer_kernels.gpu.tiles import Tile, architecture_of, tile

KERNEL = "lsh_hash"

FACTORS_A_LAUNCH = 4
"""As many as automatic factors have; longer lists take several launches."""

_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}

_INTEGERS = (
    *("batch_stride", "head_stride", "row_stride", "rotation_head_stride", "rotation_stride", "width"),
    *("H", "L", "R", "factors", "factor0", "factor1", "factor2", "factor3", "column", "id_stride"),
)


@triton.jit
def _load_columns(  # type: ignore[no-untyped-def]
    x, rotation, d0, columns, rows_inside, columns_inside, row_offsets, rotation_stride,
    D: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Dimensions [d0, d0 + DIMS) of the rows [ROWS, DIMS] and of the rotation's columns [DIMS, COLUMNS]."""
    d = d0 + tl.arange(0, DIMS)
    a = tl.load(x + row_offsets[:, None] + d[None, :], rows_inside[:, None] & (d < D)[None, :], other=0.0)
    b = tl.load(
        rotation + d[:, None] * rotation_stride + columns[None, :],
        (d < D)[:, None] & columns_inside[None, :],
        other=0.0,
    )
    return a, b


@triton.jit
def _leading_bits(x):  # type: ignore[no-untyped-def]
    """x cut to the bits that a bfloat16 holds: what is left, x - result, is exact."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _product(a, b, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """a [M, K], of which PARTS bfloat16 numbers add up to each element, times b [K, N] float32, in float32.

    Leaves out the products of parts that are below the last bit of a float32.
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

    The first launch's ids begin at 0, later ones add; in between, -1 marks rows that are not finite. The
    last one makes them 0, and padding the id after the last.
    """
    program = tl.program_id(0)
    round_ = program % R
    program = program // R
    tiles = tl.cdiv(L, ROWS)
    head = (program // tiles).to(tl.int64)
    row = (program % tiles) * ROWS + tl.arange(0, ROWS)
    inside = row < L
    batch = head // H
    # In units of ALIGN, which tells the compiler that whole vectors can be loaded.
    row_offsets = row.to(tl.int64) * ((row_stride // ALIGN).to(tl.int64) * ALIGN)
    x += batch * ((batch_stride // ALIGN).to(tl.int64) * ALIGN)
    x += (head % H) * ((head_stride // ALIGN).to(tl.int64) * ALIGN)
    rotation = rotations + (head % H) * rotation_head_stride + round_.to(tl.int64) * width
    rotation_stride = rotation_stride.to(tl.int64)
    out = buckets + (head * R + round_) * L + row

    ids = tl.zeros([ROWS], tl.int32)
    bad = tl.zeros([ROWS], tl.int32)
    if not FIRST:
        ids = tl.load(out, inside, other=0)
        bad = (ids < 0).to(tl.int32)
    for n in range(factors):
        factor = tl.where(n == 0, factor0, tl.where(n == 1, factor1, tl.where(n == 2, factor2, factor3)))
        half = factor // 2
        high = tl.full([ROWS], float("-inf"), tl.float32)  # the largest projection and, below, of -x
        low = tl.full([ROWS], float("-inf"), tl.float32)
        high_index = tl.zeros([ROWS], tl.int32)
        low_index = tl.zeros([ROWS], tl.int32)
        for c0 in range(0, half, COLUMNS):
            c = c0 + tl.arange(0, COLUMNS)
            valid = c < half
            projected = tl.zeros([ROWS, COLUMNS], tl.float32)
            for d0 in tl.static_range(0, D, DIMS):
                a, b = _load_columns(
                    x, rotation, d0, column + c, inside, valid, row_offsets, rotation_stride, D, DIMS
                )
                projected += _product(a, b, PARTS)
            infinite = (tl.abs(projected) < float("inf")) == 0
            bad = tl.maximum(bad, tl.max(infinite.to(tl.int32), 1))
            projected = tl.where(infinite, 0.0, projected)
            masked = tl.where(valid[None, :], projected, float("-inf"))
            best, index = tl.max(masked, 1, return_indices=True)  # of equal ones the first
            high_index = tl.where(best > high, c0 + index, high_index)
            high = tl.maximum(best, high)
            masked = tl.where(valid[None, :], -projected, float("-inf"))
            best, index = tl.max(masked, 1, return_indices=True)
            low_index = tl.where(best > low, c0 + index, low_index)
            low = tl.maximum(best, low)
        ids += id_stride * tl.where(low > high, half + low_index, high_index)
        id_stride *= factor
        column += half
    if LAST:
        ids = tl.where(bad != 0, 0, ids)
        if HAS_PADDING:
            pad = tl.load(padding + batch * L + row, inside, other=0)
            ids = tl.where(pad != 0, id_stride, ids)
    else:
        ids = tl.where(bad != 0, -1, ids)
    tl.store(out, ids, inside)


def lsh_hash(x: Tensor, rotations: Tensor, factors: Sequence[int], padding: Tensor | None) -> Tensor:
    """The launcher: arguments as `reference.lsh_hash`, already checked; rotations on x's device."""
    B, H, L, D = x.shape
    R, width = rotations.shape[2:]
    check_rows([("x", x)])
    buckets = torch.empty((B, H, R, L), dtype=torch.int32, device=x.device)
    if not buckets.numel():
        return buckets
    if D > 256:
        raise ValueError(f"x's last dimension must be in 1..256, got {D}")
    rotations = rotations.contiguous()
    chosen = tile(KERNEL, architecture=architecture_of(x.device), bits=8 * x.element_size(), head_dim=D)
    programs = check_programs(B * H * R * triton.cdiv(L, chosen.rows))
    column, id_stride = 0, 1
    with on_device(x):
        for first in range(0, len(factors), FACTORS_A_LAUNCH):
            now = factors[first : first + FACTORS_A_LAUNCH]
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
                len(now),
                *now,
                *[2] * (FACTORS_A_LAUNCH - len(now)),
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
            column += sum(now) // 2
            id_stride *= math.prod(now)
    return buckets


def _tile_arguments(chosen: Tile) -> dict[str, int]:
    return {"ROWS": chosen.rows, "COLUMNS": chosen.keys, "DIMS": chosen.dims}


def specializations(
    *, architecture: str, dtype: torch.dtype, head_dim: int, options: str, tiles: Mapping[str, Tile]
) -> list[Specialization]:
    """See `ops.specialization`. "all" is the last of several launches, with padding."""
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
        )
    ]

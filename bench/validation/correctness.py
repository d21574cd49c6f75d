"""Checks every operation and option on the device against the float64 reference, on the same layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

import reformer_kernels.ops.residual.op  # noqa: F401  registers the operators
from reformer_kernels import Layout, LSHConfig, functional
from reformer_kernels.testing import TOLERANCE, near_ties, normal, relative_error
from validation import layers
from validation.context import Context, Row, attempts
from validation.judging import (
    BF16,
    F16,
    F32,
    LOW_PRECISION_RATIO,
    TF32_TOLERANCE,
    errors,
    exact,
    gradients,
    inputs,
    judged,
)

PRESETS: dict[str, Callable[..., LSHConfig]] = {
    "paper": LSHConfig.paper,
    "trax": LSHConfig.trax,
    "lucidrains": LSHConfig.lucidrains,
    "bucket": partial(LSHConfig.paper, window="bucket"),
}


def steps(context: Context, shard: int = 0, shards: int = 1, after: int = 0) -> Iterator[Row]:
    """One row for each case of process `shard` of `shards`, without the first `after` of its cases."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    yield from attempts(cases(context)[shard::shards][after:])


def cases(context: Context) -> list[tuple[str, Callable[[], Row]]]:
    """The cases by name, those first that are most likely to fail."""
    checks: dict[str, Callable[[], Row]] = {}

    def add(check: Callable[..., Row], **fields: Any) -> None:
        words = []
        for name, value in fields.items():
            if isinstance(value, bool):
                words.append(name if value else f"not {name}")
            else:
                words.append(str(value).removeprefix("torch."))
        checks[" ".join([check.__name__, *words])] = partial(check, context, **fields)

    if context.dry_run:
        add(like_sdpa, dtype=F32, D=16, causal=False)
        add(hash_, dtype=F32, factors=(4, 6), padding=True)
        add(sort, n_buckets=20, L=70)
        add(attention, preset="paper", causal=True, dtype=F32, D=16, L=37, padding="some", dropout=0.2)
        add(local, causal=False, ring=True, dtype=F32, D=16)
        add(layers.cross, causal=False, dtype=F32, D=16)
        add(layers.feed_forward, dtype=F32, activation="gelu")
        add(layers.loss, dtype=F32)
        add(layers.decoding)
        add(layers.module)
        return list(checks.items())

    # dK and dV come first: transposed operands from an earlier product have been reported wrong on Hopper.
    for D, dtype in ((64, BF16), (128, BF16), (64, F16)):
        for causal in (False, True):
            add(like_sdpa, dtype=dtype, D=D, causal=causal)
    for preset in PRESETS:
        for causal in (True, False):
            add(attention, preset=preset, causal=causal, dtype=BF16, D=64, L=1000)
    for causal, dtype, D in ((False, BF16, 64), (True, BF16, 64), (False, F32, 64), (False, F16, 128)):
        add(layers.cross, causal=causal, dtype=dtype, D=D)
    add(layers.decoding)
    add(layers.module)
    for dtype in (BF16, F32):
        add(layers.loss, dtype=dtype)
        add(layers.feed_forward, dtype=dtype, activation="gelu")
    add(layers.feed_forward, dtype=BF16, activation="swiglu")
    for dtype in (F32, BF16, F16):
        add(hash_, dtype=dtype, factors=(64,), padding=False)
        add(hash_, dtype=dtype, factors=(32, 16, 8), padding=True)
    for n_buckets in (2, 129, 4097, 2**15, 2**20):
        add(sort, n_buckets=n_buckets, L=100_003)
    for preset in PRESETS:
        add(attention, preset=preset, causal=True, dtype=F32, D=64, L=777)
    for D in (128, 256, 32, 96, 40, 1):
        add(attention, preset="paper", causal=True, dtype=BF16, D=D, L=515)
    for D in (128, 256):
        add(attention, preset="paper", causal=True, dtype=F32, D=D, L=515)
    for preset in ("paper", "trax", "bucket"):
        add(attention, preset=preset, causal=True, dtype=BF16, D=64, L=700, padding="some", dropout=0.1)
        add(attention, preset=preset, causal=False, dtype=F16, D=64, L=700, padding="rows")
    for L in (1, 2, 63, 64, 65, 129):
        add(attention, preset="paper", causal=True, dtype=BF16, D=64, L=L)
    for chunk in (16, 48, 128, 200):
        add(attention, preset="trax", causal=False, dtype=BF16, D=64, L=900, chunk=chunk)
    add(attention, preset="paper", causal=False, dtype=BF16, D=64, L=900, chunks_after=1, chunks_before=2)
    add(attention, preset="paper", causal=True, dtype=BF16, D=64, Dv=32, L=333)
    add(attention, preset="paper", causal=True, dtype=BF16, D=64, L=1000, heads=40)
    add(attention, preset="paper", causal=True, dtype=F32, D=64, L=515, tf32=True)
    for causal, ring, dtype, D in ((False, True, BF16, 64), (True, False, F32, 64), (False, False, F16, 128)):
        add(local, causal=causal, ring=ring, dtype=dtype, D=D)
    add(whole_call, dtype=BF16, D=64)
    add(residual, dtype=BF16)
    return list(checks.items())


def like_sdpa(context: Context, *, dtype: torch.dtype, D: int, causal: bool) -> Row:
    """Full attention (one chunk that holds all tokens) and torch's own, each against float64."""
    B, H, L = context.pick((2, 4, 128), (1, 1, 20))
    leaves = inputs(context, dtype, *[(B, H, L, D)] * 3)
    names = ["out", "dq", "dk", "dv"]

    def sdpa(x: list[Tensor]) -> list[Tensor]:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = torch_functional.scaled_dot_product_attention(*x, is_causal=causal)
        return [out, *gradients([out], x)]

    def ours(x: list[Tensor]) -> list[Tensor]:
        out = functional.local_attention(
            *x, chunk_length=L, chunks_before=0, causal=causal, backend=context.backend
        )
        return [out, *gradients([out], x)]

    expected = sdpa(exact(leaves))
    sdpa_errors, our_errors = errors(names, sdpa(leaves), expected), errors(names, ours(leaves), expected)
    ratio = max(our_errors[name] / max(sdpa_errors[name], 1e-7) for name in names)
    beside = {f"{name}_sdpa": float(f"{error:.3g}") for name, error in sdpa_errors.items()}
    row = judged(
        our_errors, TOLERANCE[dtype], ratio=round(ratio, 2), ratio_limit=LOW_PRECISION_RATIO, **beside
    )
    # Float32 errors depend on the order of addition, so that only the tolerance decides there.
    return row | {"ok": row["ok"] and (dtype == F32 or ratio <= LOW_PRECISION_RATIO)}


def attention(
    context: Context,
    *,
    preset: str,
    causal: bool,
    dtype: torch.dtype,
    D: int,
    L: int,
    Dv: int | None = None,
    padding: str = "none",
    dropout: float = 0.0,
    chunk: int | None = None,
    heads: int | None = None,
    tf32: bool = False,
    **fields: int,
) -> Row:
    """out, lse and the gradients of `attend`, on a layout from the float64 reference."""
    B, H = 2, heads or context.pick(3, 1)
    config = PRESETS[preset](
        n_hashes=context.pick(3, 2), chunk_length=chunk or context.pick(64, 16), causal=causal, **fields
    )
    leaves = inputs(context, dtype, (B, H, L, D), (B, H, L, Dv or D))
    mask = None
    if padding == "some":
        mask = (torch.rand(B, L, generator=torch.Generator().manual_seed(3)) < 0.3).to(context.device)
    elif padding == "rows":
        mask = (torch.arange(B) % 2 == 1)[:, None].expand(B, L).to(context.device)
    with torch.no_grad():
        layout = functional.lsh_layout(
            leaves[0].double(), config, seed=0, key_padding_mask=mask, backend="reference"
        )

    def run(x: list[Tensor], backend: str) -> list[Tensor]:
        results = functional.attend(
            *x,
            layout,
            config,
            key_padding_mask=mask,
            dropout_p=dropout,
            seed=7,
            backend=backend,
            return_lse=True,
        )
        return [*results, *gradients(list(results), x)]

    names = ["out", "lse", "dqk", "dv"]
    expected = run(exact(leaves), "reference")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        measured = errors(names, run(leaves, context.backend), expected)
    finally:
        torch.set_float32_matmul_precision(before)
    plain = errors(names, run(leaves, "reference"), expected)
    return judged(
        measured, TF32_TOLERANCE if tf32 else TOLERANCE[dtype], plain=float(f"{max(plain.values()):.3g}")
    )


def local(context: Context, *, causal: bool, ring: bool, dtype: torch.dtype, D: int) -> Row:
    """out, lse and the gradients of `local_attention`, with padding."""
    B, H, L = context.pick((2, 3, 777), (1, 1, 37))
    leaves = inputs(context, dtype, *[(B, H, L, D)] * 3)
    mask = (torch.rand(B, L, generator=torch.Generator().manual_seed(3)) < 0.2).to(context.device)

    def run(x: list[Tensor], backend: str) -> list[Tensor]:
        results = functional.local_attention(
            *x,
            chunk_length=context.pick(64, 16),
            causal=causal,
            ring=ring,
            key_padding_mask=mask,
            backend=backend,
            return_lse=True,
        )
        return [*results, *gradients(list(results), x)]

    names = ["out", "lse", "dq", "dk", "dv"]
    return judged(
        errors(names, run(leaves, context.backend), run(exact(leaves), "reference")), TOLERANCE[dtype]
    )


def hash_(context: Context, *, dtype: torch.dtype, factors: tuple[int, ...], padding: bool) -> Row:
    """Ids are equal but for ties that float32 cannot tell apart, also for padding and rows that are not
    finite."""
    B, H, L, D, R = context.pick((2, 4, 3001, 64, 4), (1, 2, 40, 8, 2))
    x = normal(B, H, L, D, dtype=dtype)
    x[0, 0, 3, 2] = float("nan")
    rotations = normal(H, D, R, sum(factors) // 2, dtype=torch.float32, seed=5)
    mask = torch.rand(B, L) < 0.2 if padding else None
    on_device = [None if t is None else t.to(context.device) for t in (x, rotations, mask)]
    ours = functional.lsh_hash(*on_device[:2], factors, on_device[2], backend=context.backend).cpu()
    expected = functional.lsh_hash(x, rotations, factors, mask, backend="reference")
    differ, ties = ours != expected, near_ties(x.nan_to_num(), rotations, factors)
    return {"ok": not (differ & ~ties).any(), "differ": int(differ.sum()), "of": differ.numel()}


def sort(context: Context, *, n_buckets: int, L: int) -> Row:
    """The stable order, exactly, for uniform ids, one huge bucket, sorted ids and reversed ids."""
    segments = context.pick(6, 2)
    ids = torch.randint(0, n_buckets, (4, segments, L), dtype=torch.int32)
    ids[1].masked_fill_(torch.rand(segments, L) < 0.9, n_buckets // 2)
    ids[2], ids[3] = ids[2].sort(-1).values, ids[3].sort(-1, descending=True).values
    order = functional.bucket_sort(ids.to(context.device), n_buckets, backend=context.backend)
    expected = ids.sort(dim=-1, stable=True).indices.int()
    return {"ok": torch.equal(order.cpu(), expected)}


def whole_call(context: Context, *, dtype: torch.dtype, D: int) -> Row:
    """`lsh_attention` equals `attend` on the layout of `lsh_layout`, and a second call equals the first."""
    B, H, L = context.pick((2, 8, 4096), (1, 1, 40))
    config = LSHConfig.paper(causal=True, n_hashes=4, chunk_length=context.pick(64, 16))
    leaves = inputs(context, dtype, *[(B, H, L, D)] * 2)
    rotations = functional.sample_rotations(config, H, D, 0).to(context.device)
    layout: Layout = functional.lsh_layout(leaves[0], config, rotations=rotations, backend=context.backend)

    def run(**options: Any) -> list[Tensor]:
        out = functional.lsh_attention(*leaves, config, backend=context.backend, **options)
        return [out, *gradients([out], leaves)]

    first, again, halves = run(rotations=rotations), run(rotations=rotations), run(layout=layout)
    same = [torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, halves, strict=True)]
    expected = functional.attend(*exact(leaves), layout, config, backend="reference")
    row = judged({"out": relative_error(first[0], expected)}, TOLERANCE[dtype])
    return row | {"ok": row["ok"] and all(same), "same_again": all(same)}


def residual(context: Context, *, dtype: torch.dtype) -> Row:
    """A fixed-point step that adds and one that subtracts undo each other exactly."""
    rows, width = context.pick((4096, 1024), (3, 20))
    stream = torch.randint(-(2**28), 2**28, (rows, width), dtype=torch.int32, device=context.device)
    delta = normal(rows, width, dtype=dtype).to(context.device)
    scale = torch.tensor(2.0**20, device=context.device)
    flag = torch.zeros(1, dtype=torch.int32, device=context.device)
    before = stream.clone()
    for sign in (1, -1):
        torch.ops.reformer_kernels.triton_residual_step(
            stream, delta, sign, scale, flag, dtype, "layer", None, None, 1e-5
        )
    return {"ok": torch.equal(stream, before) and not flag.any()}

"""The public functions: check the arguments, resolve the back end once, call the operators.

Shapes use B batch, H heads, L length, D head dimension (1..256), Dv value dimension (1..256), R hash rounds.
Tensors are float32, bfloat16, float16, or float64 (reference only), with any strides. Functions raise
ValueError for wrong shapes and values, TypeError for wrong types and dtypes, RuntimeError for a back end that
cannot run. Under `torch.autocast` they cast q, k, v to the autocast dtype, as
`torch.nn.functional.scaled_dot_product_attention` does.

`backend`: "auto" takes the reference for float64, else the native kernels on the CPU and the Triton kernels
on CUDA and ROCm devices; a back end asked for by name runs or raises. `torch.compile(fullgraph=True)` traces
all functions; the kernels' operators keep L symbolic, while the reference is specialised to each L.

On CUDA tensors nothing waits for the device, and with rotations and seed on it (or a layout) a call can be
captured in a CUDA graph.

`seed`: an int, or an int64 tensor of one element; None draws one from torch's global generator, so that
`torch.manual_seed` reproduces a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from . import _autocast, _dispatch
from ._backend import resolve_backend, resolve_sort_backend
from ._checks import (
    MAX_HEAD_DIM,
    MAX_LENGTH,
    check_config,
    check_dropout,
    check_layout,
    check_padding,
    check_qkv,
    check_rotations,
    check_rows,
    check_size,
    check_tensor,
)
from ._dispatch import Seed
from .chunked import chunked_feed_forward, linear_cross_entropy
from .config import (
    LSHConfig,
    check_factors,
    check_flag,
    check_integer,
    check_scale,
    local_config,
    resolve_rule,
    resolve_scale,
)
from .cross_attention import lsh_cross_attention, lsh_cross_layout
from .layout import Layout
from .ops.hash import rotations as hash_rotations

__all__ = [
    "attend",
    "bucket_sort",
    "chunked_feed_forward",
    "linear_cross_entropy",
    "local_attention",
    "lsh_attention",
    "lsh_cross_attention",
    "lsh_cross_layout",
    "lsh_hash",
    "lsh_layout",
    "sample_rotations",
]


# Hashing and sorting


def sample_rotations(
    config: LSHConfig, heads: int, head_dim: int, seed: Seed = None, *, shared_heads: bool = False
) -> Tensor:
    """Random rotations for `lsh_hash` and `lsh_layout`: independent normal numbers (section 2 of the paper).

    They are drawn on the CPU from `seed`, so that every device and back end sees the same ones.

    -> (heads, or 1 if `shared_heads`, head_dim, config.n_hashes, config.rotation_width) float32, on the CPU.
    """
    check_config(config)
    check_size("heads", heads, 1, MAX_LENGTH)
    check_size("head_dim", head_dim, 1, MAX_HEAD_DIM)
    check_flag("shared_heads", shared_heads)
    seed = _dispatch.resolve_seed(seed)
    rows = 1 if shared_heads else heads
    return hash_rotations.sample_rotations(seed, rows, head_dim, config.n_hashes, config.rotation_width)


def lsh_hash(
    x: Tensor,
    rotations: Tensor,
    bucket_factors: int | Sequence[int],
    key_padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Bucket ids by angle: b_k = argmax([x R_k; -x R_k]), id = b_0 + f_0 * b_1 + f_0 * f_1 * b_2 + ...

    R_k is the k-th factor's f_k / 2 columns of the rotation. n = prod(f) buckets; padding gets the extra
    id n; a row whose projection is not finite gets id 0; ties take the lowest index. Projections accumulate
    in float32 or better. Source: section 2 of the paper; factors as in trax.

    x (B, H, L, D); rotations (H or 1, D, R, sum(f) // 2) float32 (or float64 with float64 x), more columns
    are not read; bucket_factors even integers, one or several; key_padding_mask (B, L) bool, True = padding,
    or float, -inf = padding. -> (B, H, R, L) int32.
    """
    factors = check_factors(bucket_factors)
    x = _autocast.cast(check_rows("x", x))
    padding = check_padding(key_padding_mask, x)
    check_rotations(rotations, x, width=sum(factors) // 2)
    return _dispatch.hash_rows(x, rotations, factors, 0, padding, resolve_backend(backend, x.device, x.dtype))


def bucket_sort(buckets: Tensor, n_buckets: int, backend: str = "auto") -> Tensor:
    """Positions in order of (bucket, position), each row on its own: a stable counting sort, O(L + n).

    buckets (..., L) int32 or int64, ids in 0..n_buckets-1 (padding's extra bucket counts); ids outside
    count as the nearest bucket. -> order, the same shape, int32: a permutation of 0..L-1 a row.

    The one function whose back end "native" takes CUDA tensors, where the extension was built with CUDA.
    """
    check_tensor("buckets", buckets)
    if buckets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"buckets must be int32 or int64, got {buckets.dtype}; convert with buckets.int()")
    if buckets.dim() < 1 or buckets.shape[-1] < 1:
        raise ValueError(f"buckets must be (..., L) with L >= 1, got shape {tuple(buckets.shape)}")
    check_integer("n_buckets", n_buckets, 1, 2**31 - 2)
    backend = resolve_sort_backend(backend, buckets.device)
    # Clamped before it narrows, so that an int64 id cannot wrap around.
    ids = buckets.clamp(0, n_buckets - 1).to(torch.int32)
    segments = ids.reshape(math.prod(ids.shape[:-1]), 1, 1, ids.shape[-1])
    return _dispatch.sort_buckets(segments, n_buckets, n_buckets + 1, backend)[0].reshape(buckets.shape)


def lsh_layout(
    qk: Tensor,
    config: LSHConfig,
    *,
    rotations: Tensor | None = None,
    seed: Seed = None,
    key_padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> Layout:
    """Hash and sort: the first half of `lsh_attention`. Carries no gradient.

    Sequences that fit one chunk (window "chunks", L <= chunk_length) are not hashed: one round, in order of
    position. Then neither rotations nor seed is read.

    qk (B, H, L, D); rotations (H or 1, D, n_hashes, config.rotation_width) float32, else drawn from `seed`;
    key_padding_mask (B, L) bool, True = padding, or float, -inf = padding. -> `Layout`.
    """
    check_config(config)
    qk = _autocast.cast(check_rows("qk", qk))
    padding = check_padding(key_padding_mask, qk)
    if rotations is not None:
        check_rotations(rotations, qk, width=config.rotation_width, rounds=config.n_hashes)
    return _dispatch.make_layout(
        qk, config, rotations, seed, padding, resolve_backend(backend, qk.device, qk.dtype)
    )


# Attention


@overload
def attend(
    q: Tensor,
    v: Tensor,
    layout: Layout,
    config: LSHConfig,
    *,
    k: Tensor | None = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    seed: Seed = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def attend(
    q: Tensor,
    v: Tensor,
    layout: Layout,
    config: LSHConfig,
    *,
    k: Tensor | None = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    seed: Seed = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def attend(
    q: Tensor,
    v: Tensor,
    layout: Layout,
    config: LSHConfig,
    *,
    k: Tensor | None = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    seed: Seed = ...,
    backend: str = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def attend(
    q: Tensor,
    v: Tensor,
    layout: Layout,
    config: LSHConfig,
    *,
    k: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Seed = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a layout: the second half of `lsh_attention`. Differentiable in q, k, v.

    out_i = sum_j p_ij v_j, p_i = softmax over all rounds of scale * q_i . k_j - log N_ij; which j is seen,
    k_j and N_ij are told by `config`.

    q (B, H, L, D); v (B, H, L, Dv); layout as `lsh_layout` made it for these shapes; k (B, H, L, D), or None
    for shared query-keys, k = q normalised by config.key_norm. Shared query-keys never see their own
    position (unless they see nothing else); with k given they may.
    key_padding_mask (B, L) bool, True = padding: not seen as key, read as zeros. Or float: added to the
    logits of its keys, -inf = padding; it carries no gradient.
    dropout_p in [0, 1): the probabilities' dropout, the same for the same seed in every back end.

    -> out (B, H, L, Dv) in the inputs' dtype; with `return_lse` also lse (B, H, L) float32 (float64 for
    float64), the log-sum-exp of each query's logits, differentiable. A query that sees nothing: v_i and
    -1e5 with shared query-keys; 0 and -inf with k given or if it is padding.
    """
    check_config(config)
    q, v, k = check_qkv(q, v, k)
    padding = check_padding(key_padding_mask, q)
    check_layout(layout, q, config.rounds(q.shape[2]))
    check_dropout(dropout_p)
    check_flag("return_lse", return_lse)
    rule = resolve_rule(config, q.shape[2], shared_qk=k is None)
    scale = resolve_scale(config.scale, q.shape[-1])
    backend = resolve_backend(backend, q.device, q.dtype)
    out, lse = _dispatch.attend_layout(q, k, v, layout, padding, rule, scale, dropout_p, seed, backend)
    return (out, lse) if return_lse else out


@overload
def lsh_attention(
    qk: Tensor,
    v: Tensor,
    config: LSHConfig,
    *,
    rotations: Tensor | None = ...,
    layout: Layout | None = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    seed: Seed = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def lsh_attention(
    qk: Tensor,
    v: Tensor,
    config: LSHConfig,
    *,
    rotations: Tensor | None = ...,
    layout: Layout | None = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    seed: Seed = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def lsh_attention(
    qk: Tensor,
    v: Tensor,
    config: LSHConfig,
    *,
    rotations: Tensor | None = ...,
    layout: Layout | None = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    seed: Seed = ...,
    backend: str = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def lsh_attention(
    qk: Tensor,
    v: Tensor,
    config: LSHConfig,
    *,
    rotations: Tensor | None = None,
    layout: Layout | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Seed = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LSH attention with shared query-keys: `lsh_layout`, then `attend`. Section 2 of the paper.

    qk (B, H, L, D); v (B, H, L, Dv); rotations (H or 1, D, n_hashes, config.rotation_width) float32, else
    drawn from `seed`; or a layout, which needs neither. `seed` also keys dropout; None draws
    one number for both.
    The other arguments and the results are those of `attend`.

    >>> qk, v = torch.randn(1, 2, 256, 32), torch.randn(1, 2, 256, 32)
    >>> lsh_attention(qk, v, LSHConfig.paper(causal=True), seed=0, backend="reference").shape
    torch.Size([1, 2, 256, 32])
    """
    check_config(config)
    qk, v, _ = check_qkv(qk, v, None, names=("qk", "v", "k"))
    padding = check_padding(key_padding_mask, qk)
    check_dropout(dropout_p)
    check_flag("return_lse", return_lse)
    if rotations is not None:
        if layout is not None:
            raise ValueError("give rotations or a layout, got both; a layout is already hashed and sorted")
        check_rotations(rotations, qk, width=config.rotation_width, rounds=config.n_hashes)
    if layout is not None:
        check_layout(layout, qk, config.rounds(qk.shape[2]))
    backend = resolve_backend(backend, qk.device, qk.dtype)
    if dropout_p > 0 or (layout is None and rotations is None and not config.is_short(qk.shape[2])):
        seed = _dispatch.resolve_seed(seed)
    if layout is None:
        layout = _dispatch.make_layout(qk, config, rotations, seed, padding, backend)
    rule = resolve_rule(config, qk.shape[2])
    scale = resolve_scale(config.scale, qk.shape[-1])
    out, lse = _dispatch.attend_layout(qk, None, v, layout, padding, rule, scale, dropout_p, seed, backend)
    return (out, lse) if return_lse else out


@overload
def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk_length: int = ...,
    chunks_before: int = ...,
    chunks_after: int = ...,
    causal: bool = ...,
    wrap: bool = ...,
    scale: float | None = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    seed: Seed = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk_length: int = ...,
    chunks_before: int = ...,
    chunks_after: int = ...,
    causal: bool = ...,
    wrap: bool = ...,
    scale: float | None = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    seed: Seed = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk_length: int = ...,
    chunks_before: int = ...,
    chunks_after: int = ...,
    causal: bool = ...,
    wrap: bool = ...,
    scale: float | None = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    seed: Seed = ...,
    backend: str = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk_length: int = 64,
    chunks_before: int = 1,
    chunks_after: int = 0,
    causal: bool = False,
    wrap: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Seed = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within chunks of positions and their neighbours, as Hugging Face's `LocalSelfAttention`.

    out_i = sum_j p_ij v_j, p_i = softmax of scale * q_i . k_j over j in i's chunk of `chunk_length` positions
    and in the `chunks_before` before and `chunks_after` after it. A query may see its own position.

    q, k (B, H, L, D); v (B, H, L, Dv). wrap: chunks form a ring (Hugging Face always does), a key met twice
    on it counts twice; sequences of at most one chunk have no neighbours. scale None: D ** -0.5. The other
    arguments and the results are those of `attend`; a query that sees nothing gets 0, lse -inf.
    """
    check_flag("wrap", wrap)
    # Checks what it shares with this function, under the same names.
    config = local_config(chunk_length, chunks_before, chunks_after, causal=causal, wrap=wrap)
    check_scale(scale)
    q, v, k_ = check_qkv(q, v, k, k_required=True)
    padding = check_padding(key_padding_mask, q)
    check_dropout(dropout_p)
    check_flag("return_lse", return_lse)
    backend = resolve_backend(backend, q.device, q.dtype)
    rule = resolve_rule(config, q.shape[2], shared_qk=False)
    layout = _dispatch.layout_by_position(q)
    out, lse = _dispatch.attend_layout(
        q, k_, v, layout, padding, rule, resolve_scale(scale, q.shape[-1]), dropout_p, seed, backend
    )
    return (out, lse) if return_lse else out

"""The public functions: check the arguments, resolve the back end once, call the operators.

Shapes use B batch, H heads, L length, D head dimension (1..256), Dv value dimension (1..256), R hash rounds.
Tensors are float32, bfloat16, float16, or float64 (reference only), with any strides. Functions raise
ValueError for wrong shapes and values, TypeError for wrong types and dtypes, RuntimeError for a back end that
cannot run. Under `torch.autocast` they cast q, k, v to the autocast dtype, as
`torch.nn.functional.scaled_dot_product_attention` does.

`backend`: "auto" takes the reference for float64 and for devices other than the CPU (for now), the native
kernels otherwise; "native" or "reference" runs that one or raises. `torch.compile(fullgraph=True)` traces all
functions; the native operators keep L symbolic, while the reference is specialised to each L.

`seed`: an int, or an int64 tensor of one element; None draws one from torch's global generator, so that
`torch.manual_seed` reproduces a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _autocast
from ._backend import resolve_backend
from .chunked import chunked_feed_forward, linear_cross_entropy
from .config import (
    AttentionRule,
    LSHConfig,
    automatic_factors,
    check_factors,
    check_flag,
    check_integer,
    check_scale,
    resolve_rule,
    resolve_scale,
)
from .layout import Layout
from .ops.attention import reference as attention_reference
from .ops.hash import reference as hash_reference
from .ops.hash import rotations as hash_rotations
from .ops.sort import reference as sort_reference

__all__ = [
    "attend",
    "bucket_sort",
    "chunked_feed_forward",
    "linear_cross_entropy",
    "local_attention",
    "lsh_attention",
    "lsh_hash",
    "lsh_layout",
    "sample_rotations",
]

MAX_HEAD_DIM = 256
MAX_LENGTH = 2**31 - 1

_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Seed = int | Tensor | None


# Hashing and sorting


def sample_rotations(
    config: LSHConfig, heads: int, head_dim: int, seed: Seed = None, *, shared_heads: bool = False
) -> Tensor:
    """Random rotations for `lsh_hash` and `lsh_layout`: independent normal numbers (section 2 of the paper).

    They are drawn on the CPU from `seed`, so that every device and back end sees the same ones.

    -> (heads, or 1 if `shared_heads`, head_dim, config.n_hashes, config.rotation_width) float32, on the CPU.
    """
    _check_config(config)
    _check_size("heads", heads, 1, MAX_LENGTH)
    _check_size("head_dim", head_dim, 1, MAX_HEAD_DIM)
    check_flag("shared_heads", shared_heads)
    seed = _resolve_seed(seed)
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
    are not read; bucket_factors even integers, one or several; key_padding_mask (B, L) bool, True = padding.
    -> (B, H, R, L) int32.
    """
    factors = check_factors(bucket_factors)
    x = _autocast.cast(_check_rows("x", x))
    padding = _check_padding(key_padding_mask, x)
    _check_rotations(rotations, x, width=sum(factors) // 2)
    return _hash(x, rotations, factors, 0, padding, resolve_backend(backend, x.device, x.dtype))


def bucket_sort(buckets: Tensor, n_buckets: int, backend: str = "auto") -> Tensor:
    """Positions in order of (bucket, position), each row on its own: a stable counting sort, O(L + n).

    buckets (..., L) int32 or int64, ids in 0..n_buckets-1 (padding's extra bucket counts); ids outside
    count as the nearest bucket. -> order, the same shape, int32: a permutation of 0..L-1 a row.
    """
    _check_tensor("buckets", buckets)
    if buckets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"buckets must be int32 or int64, got {buckets.dtype}; convert with buckets.int()")
    if buckets.dim() < 1 or buckets.shape[-1] < 1:
        raise ValueError(f"buckets must be (..., L) with L >= 1, got shape {tuple(buckets.shape)}")
    check_integer("n_buckets", n_buckets, 1, 2**31 - 2)
    backend = resolve_backend(backend, buckets.device, torch.float32)
    # Clamped before it narrows, so that an int64 id cannot wrap around.
    ids = buckets.clamp(0, n_buckets - 1).to(torch.int32)
    segments = ids.reshape(math.prod(ids.shape[:-1]), 1, 1, ids.shape[-1])
    return _sort(segments, n_buckets, n_buckets + 1, backend)[0].reshape(buckets.shape)


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
    key_padding_mask (B, L) bool, True = padding. -> `Layout`.
    """
    _check_config(config)
    qk = _autocast.cast(_check_rows("qk", qk))
    padding = _check_padding(key_padding_mask, qk)
    if rotations is not None:
        _check_rotations(rotations, qk, width=config.rotation_width, rounds=config.n_hashes)
    return _layout(qk, config, rotations, seed, padding, resolve_backend(backend, qk.device, qk.dtype))


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
    key_padding_mask (B, L) bool, True = padding: not seen as key, read as zeros.
    dropout_p in [0, 1): the probabilities' dropout, the same for the same seed in every back end.

    -> out (B, H, L, Dv) in the inputs' dtype; with `return_lse` also lse (B, H, L) float32 (float64 for
    float64), the log-sum-exp of each query's logits, differentiable. A query that sees nothing: v_i and
    -1e5 with shared query-keys; 0 and -inf with k given or if it is padding.
    """
    _check_config(config)
    q, v, k = _check_qkv(q, v, k)
    padding = _check_padding(key_padding_mask, q)
    _check_layout(layout, q, config)
    _check_dropout(dropout_p)
    check_flag("return_lse", return_lse)
    rule = resolve_rule(config, q.shape[2], shared_qk=k is None)
    scale = resolve_scale(config.scale, q.shape[-1])
    backend = resolve_backend(backend, q.device, q.dtype)
    out, lse = _attend(q, k, v, layout, padding, rule, scale, dropout_p, seed, backend)
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
    _check_config(config)
    qk, v, _ = _check_qkv(qk, v, None, names=("qk", "v", "k"))
    padding = _check_padding(key_padding_mask, qk)
    _check_dropout(dropout_p)
    check_flag("return_lse", return_lse)
    if rotations is not None:
        if layout is not None:
            raise ValueError("give rotations or a layout, got both; a layout is already hashed and sorted")
        _check_rotations(rotations, qk, width=config.rotation_width, rounds=config.n_hashes)
    if layout is not None:
        _check_layout(layout, qk, config)
    backend = resolve_backend(backend, qk.device, qk.dtype)
    if dropout_p > 0 or (layout is None and rotations is None and not config.is_short(qk.shape[2])):
        seed = _resolve_seed(seed)
    if layout is None:
        layout = _layout(qk, config, rotations, seed, padding, backend)
    rule = resolve_rule(config, qk.shape[2])
    scale = resolve_scale(config.scale, qk.shape[-1])
    out, lse = _attend(qk, None, v, layout, padding, rule, scale, dropout_p, seed, backend)
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
    # The configuration checks what it shares with this function, under the same names.
    config = LSHConfig(
        n_hashes=1,
        chunk_length=chunk_length,
        chunks_before=chunks_before,
        chunks_after=chunks_after,
        causal=causal,
        attend_across_buckets=True,
        correct_duplicates=False,
        key_norm="none",
    )
    check_flag("wrap", wrap)
    check_scale(scale)
    q, v, k_ = _check_qkv(q, v, k, k_required=True)
    padding = _check_padding(key_padding_mask, q)
    _check_dropout(dropout_p)
    check_flag("return_lse", return_lse)
    backend = resolve_backend(backend, q.device, q.dtype)
    L = q.shape[2]
    short = config.is_short(L)
    rule = AttentionRule(
        bucket_window=False,
        chunk_length=chunk_length,
        chunks_before=0 if short else chunks_before,
        chunks_after=0 if short else chunks_after,
        window_before=0,
        window_after=0,
        bucket_mask=False,
        causal=causal,
        exclude_self=False,
        correct_duplicates=False,
        ring=wrap and not short,
        key_norm=0,
    )
    layout = _layout_by_position(q)
    out, lse = _attend(
        q, k_, v, layout, padding, rule, resolve_scale(scale, q.shape[-1]), dropout_p, seed, backend
    )
    return (out, lse) if return_lse else out


# The operators of a resolved back end


def _hash(
    x: Tensor, rotations: Tensor, factors: Sequence[int], span: int, padding: Tensor | None, backend: str
) -> Tensor:
    """Without factors, they are automatic, from the length and `span`."""
    x, rotations = _rows(x.detach()), rotations.detach().to(x.device)
    if backend == "native":
        rotations = rotations.contiguous()
        return torch.ops.reformer_kernels.native_lsh_hash(x, rotations, factors, span, padding)
    if not factors:
        factors = automatic_factors(int(x.shape[2]), span)
    return hash_reference.lsh_hash(x, rotations, factors, padding)


def _sort(buckets: Tensor, n_buckets: int, starts_size: int, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "native":
        return torch.ops.reformer_kernels.native_bucket_sort(buckets.contiguous(), n_buckets, starts_size)
    return sort_reference.bucket_sort(buckets, n_buckets, starts_size)


def _layout(
    qk: Tensor,
    config: LSHConfig,
    rotations: Tensor | None,
    seed: Seed,
    padding: Tensor | None,
    backend: str,
) -> Layout:
    L = qk.shape[2]
    if config.is_short(L):
        return _layout_by_position(qk)
    if rotations is None:
        seed = _resolve_seed(seed)
        rotations = hash_rotations.sample_rotations(
            seed, qk.shape[1], qk.shape[3], config.n_hashes, config.rotation_width
        )
    if config.bucket_factors is not None:
        n = math.prod(config.bucket_factors)
    else:
        # The automatic factors' product rounds down from this, which stays symbolic under torch.compile.
        n = 2 * torch.sym_max(1, L // config.span)  # type: ignore[assignment]
    factors = config.bucket_factors or ()
    buckets = _hash(qk, rotations, factors, config.span, padding, backend)
    return Layout(*_sort(buckets, n + 1, n + 2, backend))


def _layout_by_position(x: Tensor) -> Layout:
    B, H, L, _ = x.shape
    order = torch.arange(L, dtype=torch.int32, device=x.device).expand(B, H, 1, L).contiguous()
    ends = torch.arange(2, dtype=torch.int32, device=x.device) * L
    return Layout(order, ends.expand(B, H, 1, 2).contiguous())


def _attend(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    layout: Layout,
    padding: Tensor | None,
    rule: AttentionRule,
    scale: float,
    dropout_p: float,
    seed: Seed,
    backend: str,
) -> tuple[Tensor, Tensor]:
    key_bias = None
    if padding is not None:
        zeros = torch.zeros(padding.shape, dtype=torch.float32, device=q.device)
        key_bias = zeros.masked_fill(padding, float("-inf"))
    dropout_p = float(dropout_p)
    drawn = _resolve_seed(seed) if dropout_p > 0 else None
    q, v, k = _rows(q), _rows(v), None if k is None else _rows(k)
    order, starts = layout.order.contiguous(), layout.bucket_starts.contiguous()
    if backend == "native":
        _refuse_forward_mode(q, k, v)
        return torch.ops.reformer_kernels.native_attention(
            q, k, v, order, starts, key_bias, drawn, rule.pack(), scale, dropout_p
        )
    return attention_reference.attention(q, k, v, order, starts, key_bias, drawn, rule, scale, dropout_p)


def _rows(x: Tensor) -> Tensor:
    """`x` itself where its rows are contiguous, whatever its other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _resolve_seed(seed: Seed) -> Tensor:
    """An int64 tensor of one element; integers up to 2^64 - 1 keep their 64 bits."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"seed must be an int or an int64 tensor of one element, got {seed.dtype} {tuple(seed.shape)}"
            )
        return seed.reshape(())
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, an int64 tensor of one element, or None, got {seed!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit 64 bits, got {seed}")
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64)


# Checks


def _check_config(config: object) -> None:
    if not isinstance(config, LSHConfig):
        raise TypeError(f"config must be an LSHConfig, such as LSHConfig.paper(), got {_kind(config)}")


def _check_size(name: str, value: object, low: int, high: int) -> None:
    """As `check_integer`, but a symbolic integer, which stands for a checked size, may pass."""
    if not isinstance(value, torch.SymInt):
        check_integer(name, value, low, high)


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {_kind(x)}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}; use {name}.to_dense()")


def _check_rows(name: str, x: Any) -> Tensor:
    """A (B, H, L, D) tensor of floats with H, L >= 1 and D in 1..256."""
    _check_tensor(name, x)
    if x.dtype not in _FLOAT_DTYPES:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in _FLOAT_DTYPES)
        raise TypeError(f"{name} must be one of {accepted}, got {x.dtype}; convert with {name}.float()")
    if x.dim() != 4:
        raise ValueError(
            f"{name} must be (batch, heads, length, head_dim), got shape {tuple(x.shape)}; "
            f"one sequence of one head is {name}[None, None]"
        )
    _, heads, length, dim = x.shape
    if heads < 1 or not 1 <= length <= MAX_LENGTH:
        raise ValueError(f"{name} must have at least one head and one token, got shape {tuple(x.shape)}")
    if not 1 <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"{name} must have a head dimension of 1..{MAX_HEAD_DIM}, got {dim}")
    return x


def _check_qkv(
    q: Tensor,
    v: Tensor,
    k: Tensor | None,
    *,
    names: tuple[str, str, str] = ("q", "v", "k"),
    k_required: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checked against each other, and cast as autocast asks."""
    _check_rows(names[0], q)
    _check_rows(names[1], v)
    others: list[tuple[str, Any]] = [(names[1], v)]
    if k is not None or k_required:
        _check_rows(names[2], k)
        others.append((names[2], k))
    for name, x in others:
        if x.dtype != q.dtype and not _autocast.enabled(q.device.type):
            raise TypeError(
                f"{names[0]} and {name} must have one dtype, got {q.dtype} and {x.dtype}; "
                f"convert with {name}.to({names[0]}.dtype)"
            )
        if x.device != q.device:
            raise ValueError(
                f"{names[0]} and {name} must be on one device, got {q.device} and {x.device}; "
                f"move with {name}.to({names[0]}.device)"
            )
        if x.shape[:3] != q.shape[:3]:
            raise ValueError(
                f"{names[0]} and {name} must have the same batch, heads and length, "
                f"got shapes {tuple(q.shape)} and {tuple(x.shape)}"
            )
    if k is not None and k.shape != q.shape:
        raise ValueError(f"q and k must have one shape, got {tuple(q.shape)} and {tuple(k.shape)}")
    q, v, k = _autocast.cast(q), _autocast.cast(v), None if k is None else _autocast.cast(k)
    for name, x in ((names[1], v), (names[2], k)):
        if x is not None and x.dtype != q.dtype:
            raise TypeError(
                f"under autocast {names[0]} is {q.dtype} and {name} {x.dtype}; make them one dtype"
            )
    return q, v, k


def _check_padding(mask: Tensor | None, x: Tensor) -> Tensor | None:
    if mask is None:
        return None
    _check_tensor("key_padding_mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(
            f"key_padding_mask must be bool, True = padding, got {mask.dtype}; "
            "from a mask with 1 for tokens, pass mask == 0"
        )
    if mask.shape != (x.shape[0], x.shape[2]):
        raise ValueError(
            f"key_padding_mask must be (batch, length) = {(x.shape[0], x.shape[2])}, "
            f"got shape {tuple(mask.shape)}"
        )
    if mask.device != x.device:
        raise ValueError(f"key_padding_mask must be on {x.device}, got {mask.device}; move it with .to()")
    return mask.contiguous()


def _check_rotations(rotations: Tensor, x: Tensor, *, width: int, rounds: int | None = None) -> None:
    _check_tensor("rotations", rotations)
    if rotations.dtype != torch.float32 and not (rotations.dtype == x.dtype == torch.float64):
        raise TypeError(f"rotations must be float32, got {rotations.dtype}; convert with rotations.float()")
    heads, dim = x.shape[1], x.shape[3]
    wanted = f"({heads} or 1, {dim}, {'R' if rounds is None else rounds}, {width})"
    if (
        rotations.dim() != 4
        or rotations.shape[0] not in (1, heads)
        or rotations.shape[1] != dim
        or rotations.shape[2] < 1
        or (rounds is not None and rotations.shape[2] != rounds)
        or rotations.shape[3] < width
    ):
        raise ValueError(
            f"rotations must be (heads or 1, head_dim, n_hashes, width) = {wanted}, got shape "
            f"{tuple(rotations.shape)}; draw them with sample_rotations(config, heads, head_dim, seed)"
        )


def _check_layout(layout: Layout, q: Tensor, config: LSHConfig) -> None:
    """Types and shapes; the values are checked where they are used."""
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be a Layout, as lsh_layout makes it, got {_kind(layout)}")
    B, H, L, _ = q.shape
    R = config.rounds(L)
    for name, x in (("order", layout.order), ("bucket_starts", layout.bucket_starts)):
        _check_tensor(f"layout.{name}", x)
        if x.dtype != torch.int32:
            raise TypeError(f"layout.{name} must be int32, got {x.dtype}; convert with .int()")
        if x.device != q.device:
            raise ValueError(f"layout.{name} must be on {q.device}, got {x.device}; move it with .to()")
    if layout.order.shape != (B, H, R, L):
        raise ValueError(
            f"layout.order must be (batch, heads, rounds, length) = {(B, H, R, L)}, got shape "
            f"{tuple(layout.order.shape)}; make the layout for this input and configuration with lsh_layout"
        )
    starts = layout.bucket_starts
    if starts.dim() != 4 or starts.shape[:3] != (B, H, R) or starts.shape[3] < 2:
        raise ValueError(
            f"layout.bucket_starts must be (batch, heads, rounds, S) = ({B}, {H}, {R}, S) with S >= 2, "
            f"got shape {tuple(starts.shape)}; make the layout with lsh_layout"
        )


def _check_dropout(dropout_p: float) -> None:
    number = isinstance(dropout_p, (int, float)) and not isinstance(dropout_p, bool)
    if not number or not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be a number in [0, 1), got {dropout_p!r}; 1 would drop everything")


def _refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Autograd formulas of custom operators know reverse mode only: torch would drop tangents in silence."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "attention's native kernels have no forward-mode derivative; use backend='reference' for "
            "torch.func.jvp and dual numbers"
        )


def _kind(x: object) -> str:
    return type(x).__name__

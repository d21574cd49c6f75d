"""LSH attention of queries over keys of their own: `lsh_cross_layout` and `lsh_cross_attention`.

Part of `functional`, whose conventions of shapes, dtypes, errors, back ends and seeds hold here.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from reformer_kernels import _dispatch
from reformer_kernels._backend import resolve_backend
from reformer_kernels._checks import (
    check_config,
    check_dropout,
    check_layout_pair,
    check_padding,
    check_qkv,
    check_rotations,
    check_rows,
)
from reformer_kernels._random import Seed, resolve_seed
from reformer_kernels.config import (
    LSHConfig,
    check_flag,
    check_scale,
    resolve_cross_rule,
    resolve_scale,
    sees_all,
)
from reformer_kernels.layout import Layout

LayoutPair = tuple[Layout, Layout]


def lsh_cross_layout(
    q: Tensor,
    k: Tensor,
    config: LSHConfig,
    *,
    rotations: Tensor | None = None,
    seed: Seed = None,
    key_padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> LayoutPair:
    """Hash and sort queries and keys with the same rotations: the first half of `lsh_cross_attention`.

    Unless config.causal, the mean key (without padding) is subtracted from the keys before they are hashed:
    keys may share a large part, which moves all logits of a query alike, but leaves few buckets to tell them
    apart. A causal layout may not depend on later tokens, so there keys are hashed as they are, as queries
    always are: no query's place may depend on another query. Angles alone matter to the hash.

    q (B, H, L_q, D); k (B, H, L_k, D); rotations (H or 1, D, n_hashes, config.rotation_width) float32, else
    drawn from `seed`; key_padding_mask (B, L_k) bool, True = padding, or float, -inf = padding.
    Automatic bucket factors come from L_k, for a mean bucket of config.window_size keys, half as many if not
    causal. -> the queries' and the keys' `Layout`, without gradients.
    """
    check_config(config)
    q, k, _ = check_qkv(q, k, k, names=("q", "k", "k"), own_key_length=True)
    mask = check_padding(key_padding_mask, k)
    if rotations is not None:
        check_rotations(rotations, q, width=config.rotation_width, rounds=config.n_hashes)
    backend = resolve_backend(backend, q.device, q.dtype)
    return _dispatch.make_cross_layout(q, k, config, rotations, seed, mask, backend)


@overload
def lsh_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: LSHConfig,
    *,
    scale: float | None = ...,
    rotations: Tensor | None = ...,
    layout: LayoutPair | None = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    seed: Seed = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def lsh_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: LSHConfig,
    *,
    scale: float | None = ...,
    rotations: Tensor | None = ...,
    layout: LayoutPair | None = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    seed: Seed = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def lsh_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: LSHConfig,
    *,
    scale: float | None = ...,
    rotations: Tensor | None = ...,
    layout: LayoutPair | None = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    seed: Seed = ...,
    backend: str = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def lsh_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: LSHConfig,
    *,
    scale: float | None = None,
    rotations: Tensor | None = None,
    layout: LayoutPair | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Seed = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LSH attention of queries over other keys: self-attention with separate q and k, or cross-attention.

    out_i = sum_j p_ij v_j, p_i = softmax over the keys j that i sees in any round of
    scale * q_i . k_j - log N_ij, N_ij as in `attend`.

    Queries and keys are hashed with the same rotations and sorted apart, each by (bucket, position). The
    cursor c of query i is the number of sorted keys that are not after (its bucket, floor(i * L_k / L_q));
    (its bucket, i) if causal. With w = config.window_size it sees the keys at ranks [c - w, c) if causal,
    else [c - floor(w / 2), c + ceil(w / 2)), cut to its own bucket unless config.attend_across_buckets.
    config.causal: key j is seen only if j <= i, positions of queries and keys being counted alike, as
    `scaled_dot_product_attention(is_causal=True)` does, also where L_q and L_k differ. At most w keys
    (window "chunks") are not hashed: every query sees all of them, as in full attention.

    Keys are used as they are, with the scale of ordinary attention, so that weights trained with full
    attention serve: config.scale and config.key_norm, which belong to shared query-keys, are not read; nor
    are ring, nor the chunks other than for w. window "bucket" masks buckets and never skips the hashing.

    q (B, H, L_q, D); k (B, H, L_k, D); v (B, H, L_k, Dv); scale: None is D ** -0.5.
    rotations (H or 1, D, n_hashes, config.rotation_width) float32, else drawn from `seed`; or layout, a pair
    as `lsh_cross_layout` makes it for these shapes.
    key_padding_mask (B, L_k) bool, True = padding: not seen, read as zeros. Or float: added to the logits of
    its keys, -inf = padding; it carries no gradient. dropout_p, seed, backend, return_lse: as in
    `lsh_attention`.

    -> out (B, H, L_q, Dv) in the inputs' dtype; with `return_lse` also lse (B, H, L_q) float32 (float64 for
    float64). A query that sees nothing: 0 and -inf.

    >>> q, k, v = torch.randn(1, 2, 100, 32), torch.randn(1, 2, 400, 32), torch.randn(1, 2, 400, 32)
    >>> lsh_cross_attention(q, k, v, LSHConfig(n_hashes=2), seed=0, backend="reference").shape
    torch.Size([1, 2, 100, 32])
    """
    check_config(config)
    check_rows("k", k)
    q, v, checked_k = check_qkv(q, v, k, own_key_length=True)
    assert checked_k is not None
    k = checked_k
    mask = check_padding(key_padding_mask, k)
    check_scale(scale)
    check_dropout(dropout_p)
    check_flag("return_lse", return_lse)
    every = sees_all(config, k.shape[2])
    if rotations is not None:
        if layout is not None:
            raise ValueError("give rotations or a layout, got both; a layout is already hashed and sorted")
        check_rotations(rotations, q, width=config.rotation_width, rounds=config.n_hashes)
    if layout is not None:
        check_layout_pair(layout, q, k, rounds=1 if every else config.n_hashes)
    backend = resolve_backend(backend, q.device, q.dtype)
    if dropout_p > 0 or (layout is None and rotations is None and not every):
        seed = resolve_seed(seed)
    if layout is None:
        layout = _dispatch.make_cross_layout(q, k, config, rotations, seed, mask, backend)
    rule, scale = resolve_cross_rule(config, k.shape[2]), resolve_scale(scale, q.shape[-1])
    out, lse = _dispatch.attend_layout(
        q, k, v, layout[0], mask, rule, scale, dropout_p, seed, backend, key_layout=layout[1]
    )
    return (out, lse) if return_lse else out

"""Attention over sorted orders: shared query-keys, and local attention."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from reformer_kernels import _dispatch
from reformer_kernels._backend import resolve_backend
from reformer_kernels._checks import (
    check_config,
    check_dropout,
    check_layout,
    check_padding,
    check_qkv,
    check_rotations,
)
from reformer_kernels._random import Seed, resolve_seed
from reformer_kernels.config import (
    LSHConfig,
    check_flag,
    check_scale,
    local_config,
    resolve_rule,
    resolve_scale,
)
from reformer_kernels.layout import Layout


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
        seed = resolve_seed(seed)
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
    ring: bool = ...,
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
    ring: bool = ...,
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
    ring: bool = ...,
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
    ring: bool = False,
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

    q, k (B, H, L, D); v (B, H, L, Dv). ring: chunks form a ring (Hugging Face always does), a key met twice
    on it counts twice; sequences of at most one chunk have no neighbours. scale None: D ** -0.5. The other
    arguments and the results are those of `attend`; a query that sees nothing gets 0, lse -inf.
    """
    check_flag("ring", ring)
    # Checks what it shares with this function, under the same names.
    config = local_config(chunk_length, chunks_before, chunks_after, causal=causal, ring=ring)
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

"""Attention over sorted orders: with shared query-keys, with keys of their own, and within positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict, overload

from torch import Tensor

from reformer_kernels._checks import (
    check_config,
    check_dropout,
    check_layout,
    check_layout_pair,
    check_padding,
    check_qkv,
    check_rotations,
    check_separate_qkv,
)
from reformer_kernels._random import Seed
from reformer_kernels.call import cross_attention_call, self_attention_call
from reformer_kernels.config import LSHConfig, check_flag, local_attention_config
from reformer_kernels.functional.hashing import (
    LayoutPair,
    layout_by_position,
    make_cross_layout,
    make_layout,
)
from reformer_kernels.layout import Layout
from reformer_kernels.ops.attention.op import attention

if TYPE_CHECKING:
    from typing_extensions import Unpack

    class _Options(TypedDict, total=False):
        """The keyword arguments that all functions here share, for the overloads by `return_lse`."""

        key_padding_mask: Tensor | None
        dropout_p: float
        seed: Seed
        backend: str

    class _AttendOptions(_Options, total=False):
        k: Tensor | None

    class _LSHOptions(_Options, total=False):
        rotations: Tensor | None
        layout: Layout | None

    class _CrossOptions(_Options, total=False):
        rotations: Tensor | None
        layout: LayoutPair | None

    class _LocalOptions(_Options, total=False):
        chunk_length: int
        chunks_before: int
        chunks_after: int
        causal: bool
        ring: bool
        scale: float | None


@overload
def attend(
    q: Tensor, v: Tensor, layout: Layout, config: LSHConfig,
    *, return_lse: Literal[False] = ..., **options: Unpack[_AttendOptions],
) -> Tensor: ...  # fmt: skip
@overload
def attend(
    q: Tensor, v: Tensor, layout: Layout, config: LSHConfig,
    *, return_lse: Literal[True], **options: Unpack[_AttendOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
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
    """Attention over a layout: the second half of `lsh_attention`. Differentiable in q, k and v.

    out_i = sum_j p_ij v_j, p_i = softmax over all rounds of scale * q_i . k_j - log N_ij, where `config` says
    which j are seen, what k_j is and what N_ij is.

    Args:
        q: (B, H, L, D).
        v: (B, H, L, Dv).
        layout: what `lsh_layout` made for these shapes.
        config: the pair rule.
        k: (B, H, L, D), or None for shared query-keys, whose keys are q normalised by config.key_norm. Shared
            query-keys see their own position only where they see nothing else; with k given they may see it.
        key_padding_mask: (B, L) bool, True = padding: such a key is not seen and is read as zeros. Or a float
            bias that is added to the logits of its key, -inf or NaN = padding; it carries no gradient.
            Kernels take gradients from a float32 log-sum-exp, so those of a query are inexact where all its
            keys have biases of -1e4 or beyond (as in flash attention of torch 2.14 on the CPU): mark padding
            by True.
        dropout_p: the dropout of the probabilities, in [0, 1); the same for the same seed in every back end.
        seed: of the dropout: an int, an int64 tensor of one element, or None for one drawn from torch's
            generator.
        backend: see `functional`.
        return_lse: also return the log-sum-exp, which is differentiable.

    Returns out (B, H, L, Dv) in the inputs' dtype. With `return_lse` also lse (B, H, L) float32 (float64 for
    float64), the log-sum-exp of each query's logits. A query that sees nothing gets v_i and -1e5 with shared
    query-keys, and 0 and -inf with k given or if it is padding.
    """
    check_config(config)
    q, v, k = check_qkv(q, v, k)
    mask = check_padding(key_padding_mask, q)
    check_layout(layout, q, config.rounds(q.shape[2]))
    check_dropout(dropout_p)
    check_flag("return_lse", return_lse)
    call = self_attention_call(
        config, q, shared_qk=k is None, mask=mask, dropout_p=dropout_p, seed=seed, backend=backend
    )
    out, lse = attention(q, k, v, layout, call)
    return (out, lse) if return_lse else out


@overload
def lsh_attention(
    qk: Tensor, v: Tensor, config: LSHConfig,
    *, return_lse: Literal[False] = ..., **options: Unpack[_LSHOptions],
) -> Tensor: ...  # fmt: skip
@overload
def lsh_attention(
    qk: Tensor, v: Tensor, config: LSHConfig, *, return_lse: Literal[True], **options: Unpack[_LSHOptions]
) -> tuple[Tensor, Tensor]: ...
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

    Args:
        qk: (B, H, L, D) shared query-keys.
        v: (B, H, L, Dv).
        config: how to hash, and the pair rule.
        rotations: (H or 1, D, n_hashes, config.rotation_width) float32, or None to draw them from `seed`.
        layout: what `lsh_layout` made for these shapes; give rotations or a layout, not both.
        seed: of the rotations and of the dropout: an int, an int64 tensor of one element, or None for one
            drawn from torch's generator.
        key_padding_mask, dropout_p, backend, return_lse: as in `attend`.

    Returns what `attend` returns.

    >>> qk, v = torch.randn(1, 2, 256, 32), torch.randn(1, 2, 256, 32)
    >>> lsh_attention(qk, v, LSHConfig.paper(causal=True), seed=0, backend="reference").shape
    torch.Size([1, 2, 256, 32])
    """
    check_config(config)
    qk, v, _ = check_qkv(qk, v, None, names=("qk", "v", "k"))
    mask = check_padding(key_padding_mask, qk)
    check_dropout(dropout_p)
    check_flag("return_lse", return_lse)
    if rotations is not None:
        if layout is not None:
            raise ValueError("give rotations or a layout, got both; a layout is already hashed and sorted")
        check_rotations(rotations, qk, width=config.rotation_width, rounds=config.n_hashes)
    if layout is not None:
        check_layout(layout, qk, config.rounds(qk.shape[2]))
    call = self_attention_call(
        config,
        qk,
        mask=mask,
        dropout_p=dropout_p,
        seed=seed,
        draws_rotations=layout is None and rotations is None,
        backend=backend,
    )
    out, lse = attention(qk, None, v, layout or make_layout(qk, call, rotations), call)
    return (out, lse) if return_lse else out


@overload
def lsh_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, config: LSHConfig,
    *, return_lse: Literal[False] = ..., **options: Unpack[_CrossOptions],
) -> Tensor: ...  # fmt: skip
@overload
def lsh_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, config: LSHConfig,
    *, return_lse: Literal[True], **options: Unpack[_CrossOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def lsh_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: LSHConfig,
    *,
    rotations: Tensor | None = None,
    layout: LayoutPair | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Seed = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LSH attention of queries over other keys: cross-attention, or self-attention with separate q and k.

    out_i = sum_j p_ij v_j, p_i = softmax over the keys j that i sees in any round of
    scale * q_i . k_j - log N_ij, with N_ij as in `attend`.

    Queries and keys are hashed with the same rotations and sorted apart, each by (bucket, position). The
    cursor c of query i is the number of sorted keys that are not after (its bucket, floor(i * L_k / L_q)), or
    after (its bucket, i) if causal. With w = config.window_size it sees the keys at ranks [c - w, c) if
    causal, else [c - floor(w / 2), c + ceil(w / 2)), cut to its own bucket unless
    config.attend_across_buckets. If causal, key j is seen only if j <= i, positions of queries and keys being
    counted alike, as `scaled_dot_product_attention(is_causal=True)` does, also where L_q and L_k differ. At
    most w keys (window "chunks") are not hashed: every query sees all of them, as in full attention.

    Keys are used as they are, and config.scale None means D ** -0.5, as in ordinary attention, so that
    weights trained with full attention serve. config.key_norm, which belongs to shared query-keys, and
    config.ring are not read; the chunks count for w alone. window "bucket" masks buckets and never skips the
    hashing.

    Args:
        q: (B, H, L_q, D).
        k: (B, H, L_k, D).
        v: (B, H, L_k, Dv).
        config: how to hash, and the pair rule.
        rotations: (H or 1, D, n_hashes, config.rotation_width) float32, or None to draw them from `seed`.
        layout: the pair that `lsh_cross_layout` made for these shapes.
        key_padding_mask: (B, L_k), else as in `attend`.
        seed, dropout_p, backend, return_lse: as in `lsh_attention`.

    Returns out (B, H, L_q, Dv) in the inputs' dtype. With `return_lse` also lse (B, H, L_q) float32 (float64
    for float64). A query that sees nothing gets 0 and -inf.

    >>> q, k, v = torch.randn(1, 2, 100, 32), torch.randn(1, 2, 400, 32), torch.randn(1, 2, 400, 32)
    >>> lsh_cross_attention(q, k, v, LSHConfig(n_hashes=2), seed=0, backend="reference").shape
    torch.Size([1, 2, 100, 32])
    """
    check_config(config)
    q, k, v = check_separate_qkv(q, k, v, own_key_length=True)
    mask = check_padding(key_padding_mask, k)
    check_dropout(dropout_p)
    check_flag("return_lse", return_lse)
    if rotations is not None:
        if layout is not None:
            raise ValueError("give rotations or a layout, got both; a layout is already hashed and sorted")
        check_rotations(rotations, q, width=config.rotation_width, rounds=config.n_hashes)
    if layout is not None:
        check_layout_pair(layout, q, k, rounds=1 if config.sees_all_keys(k.shape[2]) else config.n_hashes)
    call = cross_attention_call(
        config,
        q,
        k,
        mask=mask,
        dropout_p=dropout_p,
        seed=seed,
        draws_rotations=layout is None and rotations is None,
        backend=backend,
    )
    queries, keys = layout or make_cross_layout(q, k, call, rotations)
    out, lse = attention(q, k, v, queries, call, keys)
    return (out, lse) if return_lse else out


@overload
def local_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **options: Unpack[_LocalOptions]
) -> Tensor: ...
@overload
def local_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[_LocalOptions]
) -> tuple[Tensor, Tensor]: ...
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

    out_i = sum_j p_ij v_j, p_i = softmax of scale * q_i . k_j over the positions j in i's chunk and in the
    chunks before and after it. A query may see its own position.

    Args:
        q, k: (B, H, L, D).
        v: (B, H, L, Dv).
        chunk_length: positions in a chunk.
        chunks_before, chunks_after: how many chunks before and after its own a query also sees.
        causal: a query sees no later position.
        ring: chunks form a ring, as Hugging Face's always do. A key that is met twice on it counts twice;
            sequences of at most one chunk have no neighbours.
        scale: the factor of the logits; None is D ** -0.5.
        key_padding_mask, dropout_p, seed, backend, return_lse: as in `attend`.

    Returns what `attend` returns; a query that sees nothing gets 0, lse -inf.
    """
    check_flag("ring", ring)
    # The configuration checks what it shares with this function, under the same names.
    config = local_attention_config(
        chunk_length, chunks_before, chunks_after, causal=causal, ring=ring, scale=scale
    )
    q, k, v = check_separate_qkv(q, k, v)
    mask = check_padding(key_padding_mask, q)
    check_dropout(dropout_p)
    check_flag("return_lse", return_lse)
    call = self_attention_call(
        config,
        q,
        shared_qk=False,
        by_position=True,
        mask=mask,
        dropout_p=dropout_p,
        seed=seed,
        backend=backend,
    )
    out, lse = attention(q, k, v, layout_by_position(q), call)
    return (out, lse) if return_lse else out

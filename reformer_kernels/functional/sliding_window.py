"""Attention within a band of positions: an exact sliding window."""

from __future__ import annotations

from torch import Tensor

from reformer_kernels._checks import check_dropout, check_padding, check_separate_qkv
from reformer_kernels._random import Seed
from reformer_kernels.call import self_attention_call
from reformer_kernels.config import MAX_CHUNK_LENGTH, check_flag, check_integer, local_attention_config
from reformer_kernels.functional.hashing import layout_by_position
from reformer_kernels.ops.attention.op import attention


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Seed = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of each query over the keys less than `window` positions away, as in Mistral or ModernBERT.

    out_i = sum_j p_ij v_j, p_i = softmax of scale * q_i . k_j over the keys j with |i - j| < window, and
    j <= i if causal. Nothing is hashed; the result is exact. Time and memory grow with L * window.

    Args:
        q, k: (B, H, L, D).
        v: (B, H, L, Dv).
        window: in positions, the query's own included: 1 sees only itself.
        causal: a query sees no later position.
        scale: the factor of the logits; None is D ** -0.5.
        key_padding_mask: (B, L) bool, True = padding; or a float bias of each key, -inf or NaN = padding.
        dropout_p, seed, backend: as in `attend`.

    Returns (B, H, L, Dv) in the inputs' dtype; a query that sees nothing gets 0.

    >>> q = torch.randn(1, 2, 1000, 32)
    >>> sliding_window_attention(q, q, q, 64, causal=True, backend="reference").shape
    torch.Size([1, 2, 1000, 32])
    """
    check_integer("window", window, 1, MAX_CHUNK_LENGTH)
    check_flag("causal", causal)
    config = local_attention_config(1, 0, 0, causal=causal, ring=False, scale=scale)
    q, k, v = check_separate_qkv(q, k, v)
    mask = check_padding(key_padding_mask, q)
    check_dropout(dropout_p)
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
    rule = call.rule._replace(
        rank_window=True, window_before=window - 1, window_after=0 if causal else window - 1
    )
    return attention(q, k, v, layout_by_position(q), call._replace(rule=rule))[0]

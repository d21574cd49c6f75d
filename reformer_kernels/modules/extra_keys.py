"""Keys that every query sees, such as those of `add_bias_kv`, merged into the result of LSH attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reformer_kernels._precision import autocast_suspended


def merge_extra_keys(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float
) -> Tensor:
    """Attention over the keys that gave `out` and `lse`, and over the extra keys `k` as well, exactly.

        out' = exp(lse - z) out + sum_x exp(s_x - z) v_x, s_x = scale q . k_x, z = logsumexp(lse, s)

    Args:
        out: (N, H, L, D), the result of attention.
        lse: (N, H, L), its log-sum-exp; its dtype is the precision of the merge.
        q: (N, H, L, D), the queries.
        k, v: (H, X, D), the extra keys and their values.
        scale: the factor of the logits.
        dropout_p: the probability of dropping an extra key's weight.

    Returns:
        (N, H, L, D) in out's dtype.
    """
    with autocast_suspended(q.device.type):
        k, v = k.to(lse.dtype), v.to(lse.dtype)
        logits = q.to(lse.dtype) @ k.transpose(1, 2) * scale  # [N, H, L, X]
        total = torch.logaddexp(lse, logits.logsumexp(-1))[..., None]
        p = F.dropout((logits - total).exp(), dropout_p, dropout_p > 0)
        merged = (lse[..., None] - total).exp() * out.to(lse.dtype) + p @ v
    return merged.to(out.dtype)

"""What may stand where a linear layer was: when its weight can be read, and else how it is called in chunks.

Adapters, quantisation, pruning and hooks put another module, or another computation, in a linear layer's
place. The fused operations read the weight of a layer that only multiplies by it, and call any other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint

from reformer_kernels.functional.loss import mean_loss, rows_of_logits

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether `layer(x)` is F.linear(x, layer.weight, layer.bias) and calls nothing else.

    Parametrizations are part of the weight that is read. False for other classes (adapters, quantised
    layers), for layers with hooks (pruning, the older weight and spectral norm), and for weights that compute
    their products themselves (quantised and distributed tensors).
    """
    if type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
        return False
    if any(getattr(layer, hooks) for hooks in _HOOKS) or torch_module._has_any_global_hook():
        return False
    return not is_traceable_wrapper_subclass(layer.weight)


def head_loss(head: nn.Module, x: Tensor, target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """The mean cross entropy of head(x), where the head is called on chunks of tokens.

    Backward calls the head again, chunk by chunk, so that no more logits are held than a chunk's; but a head
    with buffers may change them when called (spectral norm does), so its logits are kept instead.

    Args:
        head: maps (B, n, d) to logits (B, n, V).
        x: (B, L, d).
        target: (B, L) int64, classes or `ignore_index`.
        classes: V.

    Returns:
        the loss, a scalar, float32 or float64; see `linear_cross_entropy` for tokens that are all ignored.
    """
    again = torch.is_grad_enabled() and next(head.buffers(), None) is None

    def chunk_loss(x: Tensor, target: Tensor) -> Tensor:
        logits = head(x)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(
            wide.flatten(0, -2), target.flatten(), ignore_index=ignore_index, reduction="sum"
        )

    length = tokens_per_chunk(x, rows_of_logits(classes, x.dtype))
    losses = [
        checkpoint(chunk_loss, *chunk, use_reentrant=False) if again else chunk_loss(*chunk)
        for chunk in zip(x.split(length, 1), target.split(length, 1), strict=True)
    ]
    total = torch.stack(losses).sum()
    return mean_loss(total, (target != ignore_index).sum().to(total.dtype))


def tokens_per_chunk(x: Tensor, rows: int) -> Any:
    """The tokens n of a chunk (..., n, d) of x (..., L, d) that has about `rows` rows; at least 1."""
    others = 1
    for size in x.shape[:-2]:
        others = others * size
    return max(1, rows // max(1, others))

"""Projection, log-softmax and loss on all logits at once, in ordinary, differentiable torch: the oracle."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
) -> Tensor:
    """F.cross_entropy of the logits x weight' + bias, plus z_loss * w_y * lse**2 for each row.

    w_y is the class weight of the row's target (1 without class weights), lse the log of the sum of the
    exponentials of the row's logits. "mean" divides the sum by the sum of w_y over the rows that are not
    ignored.
    """
    logits = F.linear(x, weight, bias)
    losses = F.cross_entropy(
        logits,
        target,
        class_weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    counts = target != ignore_index
    target_weights = counts.to(logits.dtype)
    if class_weights is not None:
        target_weights = target_weights * class_weights[target.where(counts, target.new_zeros(()))]
    losses = losses + z_loss * target_weights * logits.logsumexp(-1) ** 2
    if reduction == "none":
        return losses
    return losses.sum() / target_weights.sum() if reduction == "mean" else losses.sum()

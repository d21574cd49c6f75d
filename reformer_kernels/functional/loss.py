"""The public `linear_cross_entropy`: checks the arguments, chooses the chunk size and calls the operators.

It runs on every device that torch has, through torch's own matrix products.
`torch.compile(fullgraph=True)` traces it.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from reformer_kernels._checks import check_tensor, refuse_transforms, without_transforms
from reformer_kernels._precision import wide_dtype
from reformer_kernels.functional.chunk_arguments import check_device, check_floating, rows_per_chunk
from reformer_kernels.ops.linear_cross_entropy import op as op  # registers the operators

Reduction = Literal["mean", "sum", "none"]

DEFAULT_BUDGET = 128 * 2**20
"""Bytes that the logits of one chunk may take where the caller does not say."""

ROW_MULTIPLE = 16


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Cross entropy of a projection to the vocabulary, in chunks of rows.

        loss_i = F.cross_entropy(x weight' + bias, target)_i + z_loss * w_y * lse_i**2

    Here lse_i is the log of the sum of the exponentials of row i's logits, and w_y the class weight of its
    target (1 without class weights). No [tokens, vocabulary] tensor is ever held. Logits, softmax and sums
    are in float32 (float64 where x is), whatever the input's dtype. With "mean" and "sum" the forward pass
    computes the gradients too, at the cost of the matrix products that the whole logits would need; with
    "none" backward computes the logits once more. The result is deterministic, and nothing waits for the
    device. Only first derivatives exist.

    Source: Kitaev et al., "Reformer" (arXiv 2001.04451), section 3: chunked log-probabilities and loss.

    Args:
        x: (..., d) hidden states. x, weight, bias and class_weights are float32, bfloat16, float16 or
            float64, not necessarily all the same.
        weight: (V, d), V classes; V and d at least 1.
        target: (...) int64 classes, or `ignore_index` for rows that give no loss and no gradient. Class
            probabilities are refused: such a target is itself a [tokens, vocabulary] tensor.
        bias: (V,), or None.
        class_weights: (V,) or None, as `weight` of F.cross_entropy.
        ignore_index: the target of rows to ignore.
        label_smoothing: in [0, 1].
        z_loss: the weight of the penalty on lse**2, at least 0 (Chowdhery et al., "PaLM", arXiv 2204.02311,
            section 5).
        reduction: "sum", "none", or "mean": the sum over rows divided by the sum of w_y over the rows that
            are not ignored.
        chunk_size: rows in a chunk; None takes as many as keep a chunk's logits within `memory_budget`, but
            at least 16.
        memory_budget: bytes; None means 128 MiB. Give this or `chunk_size`.

    Returns:
        The loss, a scalar, or (...) for "none"; float32, or float64 where x is.

    Raises:
        TypeError: an argument is no tensor, or has a dtype that is not accepted.
        ValueError: shapes, devices or values that do not fit.
        NotImplementedError: x, weight or bias carries a tangent of forward-mode differentiation.
        IndexError: a target is not a class (on the CPU; elsewhere it fails as torch's indexing does).

    >>> x, weight, target = torch.zeros(2, 50, 8), torch.zeros(1000, 8), torch.zeros(2, 50, dtype=torch.int64)
    >>> round(linear_cross_entropy(x, weight, target).item(), 4)
    6.9078
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss must be at least 0, got {z_loss}")
    check_floating("x", x)
    check_floating("weight", weight)
    check_tensor("target", target)
    for name, tensor in (("bias", bias), ("class_weights", class_weights)):
        if tensor is not None:
            check_floating(name, tensor)
    for name, tensor in (
        ("weight", weight),
        ("target", target),
        ("bias", bias),
        ("class_weights", class_weights),
    ):
        if tensor is not None:
            check_device(name, tensor, x.device)
    if target.is_floating_point():
        raise TypeError(
            f"target must be int64 classes, got {target.dtype}: class probabilities are a [tokens, "
            "vocabulary] tensor, which this function exists to avoid; use F.cross_entropy for them"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}; convert with target.long()")
    if x.dim() < 1 or weight.dim() != 2 or weight.size(1) != x.size(-1):
        raise ValueError(
            f"weight must be (V, {x.size(-1) if x.dim() else 'd'}) for x {tuple(x.shape)}, got "
            f"{tuple(weight.shape)}"
        )
    if weight.size(0) < 1 or weight.size(1) < 1:
        raise ValueError(
            f"weight must be (V, d) with at least one class and one feature, got {tuple(weight.shape)}"
        )
    if target.shape != x.shape[:-1]:
        raise ValueError(
            f"target must be {tuple(x.shape[:-1])} for x {tuple(x.shape)}, got {tuple(target.shape)}"
        )
    classes = weight.size(0)
    for name, tensor in (("bias", bias), ("class_weights", class_weights)):
        if tensor is not None and tuple(tensor.shape) != (classes,):
            raise ValueError(f"{name} must be ({classes},), got {tuple(tensor.shape)}")
    if class_weights is not None and class_weights.requires_grad:
        raise ValueError(
            "class_weights get no gradient, got a tensor that requires one; pass class_weights.detach()"
        )
    refuse_transforms(
        "linear_cross_entropy has", "F.cross_entropy(F.linear(x, weight, bias), target)", x, weight, bias
    )
    flat, flat_target = x.reshape(-1, x.size(-1)), target.reshape(-1)
    rows = rows_of_logits(classes, x.dtype, chunk_size, memory_budget)
    constants = (ignore_index, label_smoothing, z_loss, rows)
    operators = torch.ops.reformer_kernels
    if reduction == "none":
        losses: Tensor = operators.linear_cross_entropy_rows(
            flat, weight, flat_target, bias, class_weights, *constants
        )
        return losses.reshape(target.shape)
    needs = [
        torch.is_grad_enabled() and tensor is not None and without_transforms(tensor).requires_grad
        for tensor in (x, weight, bias)
    ]
    total: Tensor = operators.linear_cross_entropy_sum(
        flat, weight, flat_target, bias, class_weights, *constants, needs
    )[0]
    if reduction == "sum":
        return total
    return mean_loss(total, _total_weight(flat_target, class_weights, ignore_index).to(total.dtype))


def rows_of_logits(
    classes: int, dtype: torch.dtype, chunk_size: int | None = None, memory_budget: int | None = None
) -> int:
    """The rows of a chunk: `chunk_size`, or as many as keep the logits of x of `dtype` within the budget."""
    row_bytes = classes * wide_dtype(dtype).itemsize
    return rows_per_chunk(chunk_size, memory_budget, DEFAULT_BUDGET, row_bytes, ROW_MULTIPLE)


def mean_loss(total: Tensor, weight: Tensor) -> Tensor:
    """total / weight, both scalars; where weight is 0, as where all rows are ignored, no gradient follows.

    The loss itself is then NaN, or infinite where label smoothing gives a total, as in torch. The gradients
    would be 0 / 0, which the next step of the optimizer would spread over all parameters.
    """
    nothing = weight == 0
    return torch.where(nothing, total.detach() / weight, total / weight.masked_fill(nothing, 1))


def _total_weight(target: Tensor, class_weights: Tensor | None, ignore_index: int) -> Tensor:
    """The sum of w_y over the rows that are not ignored."""
    counts = target != ignore_index
    if class_weights is None:
        return counts.sum()
    return (class_weights.double()[target.where(counts, target.new_zeros(()))] * counts).sum()

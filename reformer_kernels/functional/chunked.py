"""The public chunked functions: check the arguments, choose the chunk, call the operators.

They are part of `reformer_kernels.functional`. Both run on any device that torch has, through torch's own
matrix products; `torch.compile(fullgraph=True)` traces both.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from reformer_kernels._limits import FLOAT_DTYPES
from reformer_kernels._random import Seed, resolve_seed

# These modules register the operators.
from reformer_kernels.ops.feed_forward.op import ACTIVATIONS
from reformer_kernels.ops.linear_cross_entropy.op import wide_dtype

__all__ = ["chunked_feed_forward", "linear_cross_entropy"]

Reduction = Literal["mean", "sum", "none"]

FEED_FORWARD_BUDGET = 32 * 2**20
LOSS_BUDGET = 128 * 2**20
"""Bytes that the temporaries of one chunk may take, unless the caller says otherwise."""


def chunked_feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    seed: Seed = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Two-layer feed-forward, dropout(activation(x w1' + b1)) w2' + b2, in chunks of rows.

    Forward and backward hold the d_ff columns of one chunk only; backward computes them again (one matrix
    product more: 7 instead of 6). Kitaev et al., "Reformer", section 3.

    Args:
        x: (..., d_in).
        w1: (d_ff, d_in), or (2 d_ff, d_in) for gated activations; b1: its rows' bias or None.
        w2: (d_out, d_ff); b2: (d_out,) or None. All of x's dtype, except under autocast, which casts them.
        activation: "relu", "gelu", "gelu_tanh", "silu"; or gated, first half of the columns * gate(second
            half): "glu" (gate sigmoid), "reglu" (ReLU), "geglu", "geglu_tanh" (GELU), "swiglu" (SiLU).
        dropout_p: probability of dropping an element of the hidden layer, in [0, 1).
        seed: of the dropout, an int or an int64 tensor; None: drawn from torch's generator. The mask depends
            on the seed and the chunk size.
        chunk_size: rows of x (all dimensions but the last, flattened) to a chunk; None: as many as keep a
            chunk's temporaries within `memory_budget` bytes (None: 32 MiB), but at least 64.

    Returns (..., d_out). First derivatives only. ValueError or TypeError for arguments that do not fit.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    tensors = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not (name in ("b1", "b2") and tensor is None):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w1, w2 = x.to(dtype), w1.to(dtype), w2.to(dtype)
        b1, b2 = (None if bias is None else bias.to(dtype) for bias in (b1, b2))
        tensors = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise TypeError(
                f"{name} must be {x.dtype} on {x.device} as x is, got {tensor.dtype} on {tensor.device}"
            )
    kind = ACTIVATIONS[activation]
    if x.dim() < 1 or w1.dim() != 2 or w2.dim() != 2:
        raise ValueError(
            "x, w1 and w2 must be (..., d_in), (d_ff, d_in) and (d_out, d_ff), got shapes "
            f"{tuple(x.shape)}, {tuple(w1.shape)} and {tuple(w2.shape)}"
        )
    expected = kind.inner_width(w2.size(1))
    if w1.size(0) != expected or w1.size(1) != x.size(-1):
        raise ValueError(
            f"w1 must be {(expected, x.size(-1))} for activation {activation!r}, x {tuple(x.shape)} and w2 "
            f"{tuple(w2.shape)}, got {tuple(w1.shape)}"
        )
    for name, bias, width in (("b1", b1, w1.size(0)), ("b2", b2, w2.size(0))):
        if bias is not None and tuple(bias.shape) != (width,):
            raise ValueError(f"{name} must be ({width},), got {tuple(bias.shape)}")
    flat = x.reshape(-1, x.size(-1))
    # Backward's: a, h and dh, and da where it cannot take dh's place.
    columns = 2 * w1.size(0) + 2 * w2.size(1) if kind.gated else 3 * w2.size(1)
    rows = _chunk_rows(chunk_size, memory_budget, FEED_FORWARD_BUDGET, columns * x.dtype.itemsize)
    seed_tensor = resolve_seed(seed) if dropout_p > 0 else None
    y: Tensor = torch.ops.reformer_kernels.chunked_feed_forward(
        flat, w1, b1, w2, b2, seed_tensor, activation, dropout_p, rows
    )
    return y.reshape(*x.shape[:-1], w2.size(0))


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
    """F.cross_entropy(x weight' + bias, target) in chunks of rows: no [tokens, vocabulary] tensor exists.

        loss_i = cross entropy of row i, as F.cross_entropy has it, + z_loss * w_y * lse_i**2

    with lse_i the log of the sum of the exponentials of row i's logits and w_y the class weight of its target
    (1 without class weights). Kitaev et al., "Reformer", section 3: chunked log-probabilities and loss.

    Args:
        x: (..., d) hidden states; weight: (V, d); bias: (V,) or None. float32, bfloat16, float16 or float64,
            not necessarily all the same.
        target: (...) int64 class numbers, or ignore_index: rows that give no loss and no gradient. Class
            probabilities are not taken: such a target is itself a [tokens, vocabulary] tensor.
        class_weights: (V,) or None, as `weight` of F.cross_entropy.
        label_smoothing: in [0, 1].
        z_loss: weight of the penalty on lse**2 (Chowdhery et al., "PaLM", section 5), at least 0.
        reduction: "mean" (the sum over rows / the sum of w_y over rows not ignored), "sum" or "none".
        chunk_size: rows to a chunk; None: as many as keep the logits of one within `memory_budget` bytes
            (None: 128 MiB), but at least 16.

    Returns the loss, a scalar or (...) for "none", float32 (float64 where x is). Logits, softmax and sums are
    in that precision whatever the input's. With "mean" and "sum" the forward pass computes the gradients too,
    at the cost of the products that the whole logits would need; with "none" backward makes the logits once
    more. Deterministic; does not wait for the device. First derivatives only.

    Raises TypeError, ValueError for arguments that do not fit; IndexError (CPU; elsewhere as torch indexing
    does) for a target that is not a class.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss must be at least 0, got {z_loss}")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("class_weights", class_weights)):
        if tensor is None and name in ("bias", "class_weights"):
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOAT_DTYPES:
            given = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {given}")
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if target.is_floating_point():
        raise TypeError(
            f"target must be int64 class numbers, got {target.dtype}: class probabilities are a [tokens, "
            "vocabulary] tensor, which this function exists to avoid; use F.cross_entropy for them"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    if x.dim() < 1 or weight.dim() != 2 or weight.size(1) != x.size(-1):
        raise ValueError(
            f"weight must be (V, {x.size(-1) if x.dim() else 'd'}) for x {tuple(x.shape)}, got "
            f"{tuple(weight.shape)}"
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
        raise ValueError("class_weights get no gradient; pass class_weights.detach()")
    flat, flat_target = x.reshape(-1, x.size(-1)), target.reshape(-1)
    rows = _chunk_rows(
        chunk_size, memory_budget, LOSS_BUDGET, classes * wide_dtype(x.dtype).itemsize, least=16
    )
    constants = (ignore_index, label_smoothing, z_loss, rows)
    operators = torch.ops.reformer_kernels
    if reduction == "none":
        losses: Tensor = operators.linear_cross_entropy_rows(
            flat, weight, flat_target, bias, class_weights, *constants
        )
        return losses.reshape(target.shape)
    needs = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (x, weight, bias)
    ]
    total: Tensor = operators.linear_cross_entropy_sum(
        flat, weight, flat_target, bias, class_weights, *constants, needs
    )[0]
    if reduction == "sum":
        return total
    return total / _weight_of(flat_target, class_weights, ignore_index).to(total.dtype)


def _weight_of(target: Tensor, class_weights: Tensor | None, ignore_index: int) -> Tensor:
    counts = target != ignore_index
    if class_weights is None:
        return counts.sum()
    return (class_weights.double()[target.where(counts, target.new_zeros(()))] * counts).sum()


def _chunk_rows(
    chunk_size: int | None, memory_budget: int | None, default: int, row_bytes: int, least: int = 64
) -> int:
    if chunk_size is not None and memory_budget is not None:
        raise ValueError("give chunk_size or memory_budget, not both")
    if chunk_size is not None:
        if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
            raise ValueError(f"chunk_size must be a positive number of rows, got {chunk_size!r}")
        return chunk_size
    budget = default if memory_budget is None else memory_budget
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget!r}")
    # Multiples of `least`, for the sake of the matrix products.
    return max(least, budget // max(1, row_bytes) // least * least)

"""The public `chunked_feed_forward`: checks the arguments, chooses the chunk size and calls the operator.

It runs on every device that torch has, through torch's own matrix products.
`torch.compile(fullgraph=True)` traces it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reformer_kernels._checks import autocast, check_dropout, refuse_transforms
from reformer_kernels._random import Seed, resolve_seed
from reformer_kernels.functional.chunk_arguments import check_device, check_floating, rows_per_chunk
from reformer_kernels.ops.feed_forward import op as op  # registers the operators
from reformer_kernels.ops.feed_forward.activations import ACTIVATIONS

DEFAULT_BUDGET = 32 * 2**20
"""Bytes that the temporaries of one chunk may take where the caller does not say."""

ROW_MULTIPLE = 64


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
    """The two-layer feed-forward network in chunks of rows.

        y = dropout(activation(x w1' + b1)) w2' + b2

    Forward and backward hold the d_ff hidden columns of one chunk only; backward computes them again, which
    makes 7 matrix products where 6 would do. Only first derivatives exist.

    Source: Kitaev et al., "Reformer" (arXiv 2001.04451), section 3.

    Args:
        x: (..., d_in), float32, bfloat16, float16 or float64. The other tensors have its dtype, except under
            autocast, which casts them all.
        w1: (d_ff, d_in), or (2 d_ff, d_in) for gated activations.
        b1: (d_ff,) or (2 d_ff,), or None.
        w2: (d_out, d_ff).
        b2: (d_out,), or None.
        activation: "relu", "gelu", "gelu_tanh" or "silu"; or a gated one, which multiplies the first half of
            the columns by gate(second half): "glu" (the gate is a sigmoid), "reglu" (ReLU), "geglu" and
            "geglu_tanh" (GELU), "swiglu" (SiLU).
        dropout_p: the probability of dropping an element of the hidden layer, in [0, 1).
        seed: the seed of the dropout, an int or an int64 tensor of one element; None draws one from torch's
            global generator. The mask depends on the seed and the chunk size.
        chunk_size: rows of x (all dimensions but the last, flattened) in a chunk; None takes as many as keep
            a chunk's temporaries within `memory_budget`, but at least 64.
        memory_budget: bytes; None means 32 MiB. Give this or `chunk_size`.

    Returns:
        (..., d_out), in x's dtype (the autocast dtype under autocast).

    Raises:
        TypeError: an argument is no tensor, or has another dtype than x.
        ValueError: shapes, devices or values that do not fit.
        NotImplementedError: an argument carries a tangent of forward-mode differentiation.

    >>> x, w1, w2 = torch.zeros(2, 100, 8), torch.zeros(32, 8), torch.zeros(8, 32)
    >>> chunked_feed_forward(x, w1, None, w2, None, activation="relu").shape
    torch.Size([2, 100, 8])
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    check_dropout(dropout_p)
    function = ACTIVATIONS[activation]
    x, w1, w2 = (
        autocast(check_floating(name, tensor)) for name, tensor in (("x", x), ("w1", w1), ("w2", w2))
    )
    b1, b2 = (
        None if bias is None else autocast(check_floating(name, bias))
        for name, bias in (("b1", b1), ("b2", b2))
    )
    for name, tensor in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if tensor is None:
            continue
        check_device(name, tensor, x.device)
        if tensor.dtype != x.dtype:
            raise TypeError(
                f"x and {name} must have one dtype, got {x.dtype} and {tensor.dtype}; convert with "
                f"{name}.to(x.dtype)"
            )
    if x.dim() < 1 or w1.dim() != 2 or w2.dim() != 2:
        raise ValueError(
            "x, w1 and w2 must be (..., d_in), (d_ff, d_in) and (d_out, d_ff), got shapes "
            f"{tuple(x.shape)}, {tuple(w1.shape)} and {tuple(w2.shape)}"
        )
    for name, tensor in (("w1", w1), ("w2", w2)):
        if tensor.numel() < 1:
            raise ValueError(f"d_in, d_ff and d_out must be at least 1, got {name} {tuple(tensor.shape)}")
    expected = function.inner_width(w2.size(1))
    if w1.size(0) != expected or w1.size(1) != x.size(-1):
        raise ValueError(
            f"w1 must be {(expected, x.size(-1))} for activation {activation!r}, x {tuple(x.shape)} and w2 "
            f"{tuple(w2.shape)}, got {tuple(w1.shape)}"
        )
    for name, bias, width in (("b1", b1, w1.size(0)), ("b2", b2, w2.size(0))):
        if bias is not None and tuple(bias.shape) != (width,):
            raise ValueError(f"{name} must be ({width},), got {tuple(bias.shape)}")
    refuse_transforms(
        "chunked_feed_forward has", "torch.nn.functional's linear and activation", x, w1, b1, w2, b2
    )
    flat = x.reshape(-1, x.size(-1))
    rows = rows_of_hidden(activation, w2.size(1), x.dtype, chunk_size, memory_budget)
    # On the host, where the operator reads it to seed torch's generator: one on the GPU would be waited for.
    device = x.device if isinstance(seed, Tensor) else torch.device("cpu")
    seed_tensor = resolve_seed(seed, device) if dropout_p > 0 else None
    y: Tensor = torch.ops.reformer_kernels.chunked_feed_forward(
        flat, w1, b1, w2, b2, seed_tensor, activation, dropout_p, rows
    )
    return y.reshape(*x.shape[:-1], w2.size(0))


def rows_of_hidden(
    activation: str, d_ff: int, dtype: torch.dtype, chunk_size: int | None, memory_budget: int | None
) -> int:
    """The rows of a chunk: `chunk_size`, or as many as keep the temporaries of backward within the budget."""
    function = ACTIVATIONS[activation]
    # Backward holds a, h and dh, and for gated activations da beside dh.
    columns = 2 * function.inner_width(d_ff) + 2 * d_ff if function.gated else 3 * d_ff
    return rows_per_chunk(chunk_size, memory_budget, DEFAULT_BUDGET, columns * dtype.itemsize, ROW_MULTIPLE)

"""The two-layer feed-forward network in ordinary, differentiable torch: the oracle of the chunked one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "silu": F.silu,
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "glu": torch.sigmoid,
    "reglu": ELEMENTWISE["relu"],
    "geglu": ELEMENTWISE["gelu"],
    "geglu_tanh": ELEMENTWISE["gelu_tanh"],
    "swiglu": ELEMENTWISE["silu"],
}


def activate(a: Tensor, activation: str) -> Tensor:
    """The hidden layer h from the first layer's result a; gated: first half * gate(second half)."""
    if activation in ELEMENTWISE:
        return ELEMENTWISE[activation](a)
    value, gate = a.chunk(2, dim=-1)
    return value * GATES[activation](gate)


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    dropout_factors: Tensor | None = None,
) -> Tensor:
    """(dropout_factors * activation(x w1' + b1)) w2' + b2.

    dropout_factors (rows, d_ff) holds 0 or 1 / (1 - p); None means no dropout.
    """
    h = activate(F.linear(x, w1, b1), activation)
    return F.linear(h if dropout_factors is None else h * dropout_factors, w2, b2)

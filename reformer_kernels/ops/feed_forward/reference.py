"""The two-layer feed-forward as ordinary differentiable torch: the oracle of the chunked one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SCALARS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "silu": F.silu,
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "glu": torch.sigmoid,
    "reglu": SCALARS["relu"],
    "geglu": SCALARS["gelu"],
    "geglu_tanh": SCALARS["gelu_tanh"],
    "swiglu": SCALARS["silu"],
}


def activate(a: Tensor, activation: str) -> Tensor:
    """h from the first layer's result; gated ones are first half * gate(second half)."""
    if activation in SCALARS:
        return SCALARS[activation](a)
    value, gate = a.chunk(2, dim=-1)
    return value * GATES[activation](gate)


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    keep: Tensor | None = None,
) -> Tensor:
    """w2 (keep * activation(w1 x + b1)) + b2; `keep` (rows, d_ff) is 0 or 1 / (1 - p)."""
    h = activate(F.linear(x, w1, b1), activation)
    return F.linear(h if keep is None else h * keep, w2, b2)

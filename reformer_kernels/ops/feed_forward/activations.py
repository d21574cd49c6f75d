"""Activations of a two-layer feed-forward and their derivatives, written into given memory.

Ordinary ones map the d_ff columns of the first layer to d_ff. Gated ones ("GLU variants") have 2 d_ff columns
there and give h = first half * gate(second half), as `torch.nn.functional.glu` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Scalar:
    """A function of one variable: values and gradients into `out`, which may be the first argument."""

    value: Callable[[Tensor, Tensor], Tensor]  # (a, out)
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (grad, a, value at a, out)


def _gelu(approximate: str) -> Scalar:
    return Scalar(
        lambda a, out: aten.gelu.out(a, approximate=approximate, out=out),
        lambda grad, a, value, out: aten.gelu_backward.grad_input(
            grad, a, approximate=approximate, grad_input=out
        ),
    )


RELU = Scalar(
    lambda a, out: torch.clamp_min(a, 0, out=out),
    lambda grad, a, value, out: aten.threshold_backward.grad_input(grad, a, 0, grad_input=out),
)
GELU = _gelu("none")
GELU_TANH = _gelu("tanh")
SILU = Scalar(
    lambda a, out: aten.silu.out(a, out=out),
    lambda grad, a, value, out: aten.silu_backward.grad_input(grad, a, grad_input=out),
)
SIGMOID = Scalar(
    lambda a, out: torch.sigmoid(a, out=out),
    lambda grad, a, value, out: aten.sigmoid_backward.grad_input(grad, value, grad_input=out),
)


@dataclass(frozen=True)
class Activation:
    """h from the first layer's result a, and the gradient of a."""

    scalar: Scalar
    gated: bool

    def inner_width(self, d_ff: int) -> int:
        """The first layer's columns."""
        return 2 * d_ff if self.gated else d_ff

    def value(self, a: Tensor, out: Tensor) -> Tensor:
        """h (rows, d_ff) from a (rows, inner width), into `out`."""
        if not self.gated:
            return self.scalar.value(a, out)
        plain, gate = a.chunk(2, dim=1)
        return self.scalar.value(gate, out).mul_(plain)

    def gradient(self, grad: Tensor, a: Tensor, out: Tensor) -> Tensor:
        """The gradient of a from that of h, into `out` (shaped like a); may overwrite `grad`."""
        if not self.gated:
            return self.scalar.gradient(grad, a, a, out)
        plain, gate = a.chunk(2, dim=1)
        of_plain, of_gate = out.chunk(2, dim=1)
        gate_value = self.scalar.value(gate, torch.empty_like(grad))
        torch.mul(grad, gate_value, out=of_plain)
        self.scalar.gradient(grad.mul_(plain), gate, gate_value, of_gate)
        return out


ACTIVATIONS = {
    "relu": Activation(RELU, gated=False),
    "gelu": Activation(GELU, gated=False),
    "gelu_tanh": Activation(GELU_TANH, gated=False),
    "silu": Activation(SILU, gated=False),
    "glu": Activation(SIGMOID, gated=True),
    "reglu": Activation(RELU, gated=True),
    "geglu": Activation(GELU, gated=True),
    "geglu_tanh": Activation(GELU_TANH, gated=True),
    "swiglu": Activation(SILU, gated=True),
}

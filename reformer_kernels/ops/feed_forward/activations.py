"""The activations of a two-layer feed-forward network and their derivatives, written into given memory.

Elementwise activations map the d_ff columns of the first layer to d_ff columns. Gated ones (the "GLU
variants") take 2 d_ff columns and give h = first half * gate(second half), as `torch.nn.functional.glu` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Elementwise:
    """A function of one variable: its values and its gradients, written into `out`.

    `out` may be the first argument.
    """

    value: Callable[[Tensor, Tensor], Tensor]  # (a, out)
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (grad, a, value at a, out)


def _gelu(approximate: str) -> Elementwise:
    return Elementwise(
        lambda a, out: aten.gelu.out(a, approximate=approximate, out=out),
        lambda grad, a, value, out: aten.gelu_backward.grad_input(
            grad, a, approximate=approximate, grad_input=out
        ),
    )


RELU = Elementwise(
    lambda a, out: torch.clamp_min(a, 0, out=out),
    lambda grad, a, value, out: aten.threshold_backward.grad_input(grad, a, 0, grad_input=out),
)
GELU = _gelu("none")
GELU_TANH = _gelu("tanh")
SILU = Elementwise(
    lambda a, out: aten.silu.out(a, out=out),
    lambda grad, a, value, out: aten.silu_backward.grad_input(grad, a, grad_input=out),
)
SIGMOID = Elementwise(
    lambda a, out: torch.sigmoid(a, out=out),
    lambda grad, a, value, out: aten.sigmoid_backward.grad_input(grad, value, grad_input=out),
)


@dataclass(frozen=True)
class Activation:
    """The map from the first layer's result a to the hidden layer h, and the gradient of a from that of h."""

    function: Elementwise
    gated: bool

    def inner_width(self, d_ff: int) -> int:
        """The number of columns of the first layer."""
        return 2 * d_ff if self.gated else d_ff

    def value(self, a: Tensor, out: Tensor) -> Tensor:
        """h (rows, d_ff) from a (rows, inner width), written into `out`."""
        if not self.gated:
            return self.function.value(a, out)
        linear, gate = a.chunk(2, dim=1)
        return self.function.value(gate, out).mul_(linear)

    def gradient(self, grad: Tensor, a: Tensor, out: Tensor) -> Tensor:
        """The gradient of a from that of h, written into `out` (shaped like a); may overwrite `grad`."""
        if not self.gated:
            return self.function.gradient(grad, a, a, out)
        linear, gate = a.chunk(2, dim=1)
        linear_grad, gate_grad = out.chunk(2, dim=1)
        gate_value = self.function.value(gate, torch.empty_like(grad))
        torch.mul(grad, gate_value, out=linear_grad)
        self.function.gradient(grad.mul_(linear), gate, gate_value, gate_grad)
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

"""LayerNorm and RMSNorm of a residual stream, where a residual step has already computed the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Norm = nn.LayerNorm | nn.RMSNorm


@dataclass(frozen=True)
class Normed:
    """A normalised stream, and the statistics that its gradient needs."""

    normalization: str  # "layer" or "rms"
    result: Tensor  # (rows, columns)
    mean: Tensor  # (rows,)
    rstd: Tensor  # (rows,), 1 / sqrt(variance + epsilon)


def check_norm(name: str, norm: nn.Module | None) -> None:
    """Raises TypeError or ValueError unless residual steps can compute `norm`; None passes."""
    if norm is None:
        return
    if not isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        raise TypeError(f"{name} must be an nn.LayerNorm or an nn.RMSNorm, got {type(norm).__name__}")
    if len(norm.normalized_shape) != 1:
        raise ValueError(
            f"{name} must normalise the last dimension alone, got normalized_shape "
            f"{tuple(norm.normalized_shape)}"
        )


def norm_arguments(norm: Norm, dtype: torch.dtype) -> tuple[Any, ...]:
    """The normalization, weight, bias and epsilon, as the residual operators take them."""
    if isinstance(norm, nn.LayerNorm):
        return "layer", norm.weight, norm.bias, norm.eps
    # By default torch takes the epsilon of the dtype in which it computes.
    automatic = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return "rms", norm.weight, None, automatic if norm.eps is None else norm.eps


class _Normalise(torch.autograd.Function):
    """Returns the result that was computed before, and computes its gradient."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, weight: Tensor | None, bias: Tensor | None, normed: Normed
    ) -> Tensor:
        ctx.save_for_backward(value, weight, bias, normed.mean, normed.rstd)
        ctx.normalization = normed.normalization
        return normed.result.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        value, weight, bias, mean, rstd = ctx.saved_tensors
        columns = value.shape[-1]
        mean, rstd = mean.unsqueeze(-1), rstd.unsqueeze(-1)
        if ctx.normalization == "layer" and value.dtype == torch.float32:
            value_grad, weight_grad, bias_grad = torch.ops.aten.native_layer_norm_backward(
                grad.contiguous(), value, [columns], mean, rstd, weight, bias, list(ctx.needs_input_grad[:3])
            )
            return value_grad, weight_grad, bias_grad, None
        # y = w n + b with n = (x - mean) rstd gives dn = w dy and dx = rstd (dn - mean(dn) - n mean(dn n)).
        # RMSNorm has no mean(dn).
        wide = grad.float()
        standardised = (value.float() - mean) * rstd
        standardised_grad = wide if weight is None else wide * weight.float()
        value_grad = standardised_grad - standardised * (standardised_grad * standardised).mean(
            -1, keepdim=True
        )
        if ctx.normalization == "layer":
            value_grad = value_grad - standardised_grad.mean(-1, keepdim=True)
        rows = tuple(range(grad.dim() - 1))
        weight_grad = None if weight is None else (wide * standardised).sum(rows).to(weight.dtype)
        bias_grad = None if bias is None else wide.sum(rows).to(bias.dtype)
        return (value_grad * rstd).to(value.dtype), weight_grad, bias_grad, None


def normalise(value: Tensor, norm: Norm, normed: Normed | None) -> Tensor:
    """norm(value), as a differentiable function of `value` and the module's parameters.

    `normed` is what a residual step computed; with None the module computes it.
    """
    if normed is None:
        result: Tensor = norm(value)
        return result
    bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
    result = _Normalise.apply(value, norm.weight, bias, normed)
    return result

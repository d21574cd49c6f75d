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
            of_value, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
                grad.contiguous(), value, [columns], mean, rstd, weight, bias, list(ctx.needs_input_grad[:3])
            )
            return of_value, of_weight, of_bias, None
        # y = w n + b with n = (x - mean) rstd gives dn = w dy and dx = rstd (dn - mean(dn) - n mean(dn n)).
        # RMSNorm has no mean(dn).
        wide = grad.float()
        standardised = (value.float() - mean) * rstd
        of_standardised = wide if weight is None else wide * weight.float()
        of_value = of_standardised - standardised * (of_standardised * standardised).mean(-1, keepdim=True)
        if ctx.normalization == "layer":
            of_value = of_value - of_standardised.mean(-1, keepdim=True)
        rows = tuple(range(grad.dim() - 1))
        of_weight = None if weight is None else (wide * standardised).sum(rows).to(weight.dtype)
        of_bias = None if bias is None else wide.sum(rows).to(bias.dtype)
        return (of_value * rstd).to(value.dtype), of_weight, of_bias, None


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

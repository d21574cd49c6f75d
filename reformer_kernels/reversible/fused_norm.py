"""LayerNorm and RMSNorm of a residual stream whose results a residual step has already computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Normed:
    """A stream's normalisation: the result (rows, columns) and the statistics (rows,) that its gradient
    needs."""

    kind: str  # "layer" or "rms"
    result: Tensor
    mean: Tensor
    rstd: Tensor


def check_norm(name: str, norm: nn.Module | None) -> None:
    """Raises unless residual steps can compute `norm`."""
    if norm is None:
        return
    if not isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        raise TypeError(f"{name} must be an nn.LayerNorm or an nn.RMSNorm, got {type(norm).__name__}")
    if len(norm.normalized_shape) != 1:
        raise ValueError(
            f"{name} must normalise the last dimension alone, got normalized_shape "
            f"{tuple(norm.normalized_shape)}"
        )


def settings(norm: nn.LayerNorm | nn.RMSNorm, dtype: torch.dtype) -> tuple[Any, ...]:
    """Kind, weight, bias and epsilon as the residual operators take them."""
    if isinstance(norm, nn.LayerNorm):
        return "layer", norm.weight, norm.bias, norm.eps
    # As torch: the epsilon of the dtype in which it computes.
    automatic = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return "rms", norm.weight, None, automatic if norm.eps is None else norm.eps


class _Normalise(torch.autograd.Function):
    """The result that is there already, with the gradient that belongs to it."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, weight: Tensor | None, bias: Tensor | None, normed: Normed
    ) -> Tensor:
        ctx.save_for_backward(value, weight, bias, normed.mean, normed.rstd)
        ctx.kind = normed.kind
        return normed.result.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        value, weight, bias, mean, rstd = ctx.saved_tensors
        columns = value.shape[-1]
        mean, rstd = mean.unsqueeze(-1), rstd.unsqueeze(-1)
        if ctx.kind == "layer" and value.dtype == torch.float32:
            of_value, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
                grad.contiguous(), value, [columns], mean, rstd, weight, bias, list(ctx.needs_input_grad[:3])
            )
            return of_value, of_weight, of_bias, None
        # y = w n + b with n = (x - mean) rstd:  dn = w dy,  dx = rstd (dn - mean(dn) - n mean(dn n)), and for
        # RMSNorm without the second term.
        wide = grad.float()
        normal = (value.float() - mean) * rstd
        of_normal = wide if weight is None else wide * weight.float()
        of_value = of_normal - normal * (of_normal * normal).mean(-1, keepdim=True)
        if ctx.kind == "layer":
            of_value = of_value - of_normal.mean(-1, keepdim=True)
        rows = tuple(range(grad.dim() - 1))
        of_weight = None if weight is None else (wide * normal).sum(rows).to(weight.dtype)
        of_bias = None if bias is None else wide.sum(rows).to(bias.dtype)
        return (of_value * rstd).to(value.dtype), of_weight, of_bias, None


def normalise(value: Tensor, norm: nn.LayerNorm | nn.RMSNorm, normed: Normed | None) -> Tensor:
    """norm(value), as a differentiable function of `value` and the module's parameters.

    normed: what a residual step computed; None: the module computes it.
    """
    if normed is None:
        result: Tensor = norm(value)
        return result
    bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
    result = _Normalise.apply(value, norm.weight, bias, normed)
    return result

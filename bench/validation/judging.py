"""How results are judged: inputs, their float64 copies, gradients and errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reformer_kernels.testing import normal, relative_error
from validation.context import Context, Row

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TF32_TOLERANCE = 5e-3
"""The largest relative error with TF32, which multiplies 11-bit numbers."""

LOW_PRECISION_RATIO = 2.0
"""How many times as large as PyTorch's own low-precision error a kernel's error against float64 may be."""


def judged(errors: dict[str, float], limit: float, **more: Any) -> Row:
    """A row of errors, which is "ok" if the largest of them is within `limit`."""
    worst = max(errors, key=lambda name: errors[name])
    shown = {name: float(f"{error:.3g}") for name, error in errors.items()}
    return {"ok": errors[worst] <= limit, "worst": worst, "limit": limit, **shown, **more}


def inputs(context: Context, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Leaves of these shapes on the device. `exact` turns them into float64 leaves with the same numbers."""
    tensors = [normal(*shape, dtype=dtype, seed=n).to(context.device) for n, shape in enumerate(shapes)]
    return [x.requires_grad_() for x in tensors]


def exact(leaves: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in leaves]


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of a random linear form of the outputs, where those are finite."""
    form = torch.zeros((), dtype=torch.float64, device=leaves[0].device)
    for n, out in enumerate(outputs):
        weights = normal(*out.shape, seed=90 + n).to(out.device, out.dtype)
        form = form + (out.masked_fill(~out.isfinite() | (out <= -1e4), 0) * weights).double().sum()
    grads = torch.autograd.grad(form, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]


def errors(names: list[str], ours: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    return {name: relative_error(a, b) for name, a, b in zip(names, ours, expected, strict=True)}

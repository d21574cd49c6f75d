"""The operators of the chunked loss, registered with torch: schemas, fake kernels and autograd formulas.

`linear_cross_entropy_sum` returns the sum of the losses with the gradients, which its autograd formula then
multiplies by the loss's gradient (`linear_cross_entropy_scale`). `linear_cross_entropy_rows` returns the loss
of each row and has a backward operator. `chunked` computes them all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reformer_kernels._checks import on_one_device
from reformer_kernels._precision import wide_dtype
from reformer_kernels.ops.linear_cross_entropy import chunked

_library = torch.library.Library("reformer_kernels", "FRAGMENT")
_library.define(
    "linear_cross_entropy_sum(Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weights, "
    "int ignore_index, float label_smoothing, float z_loss, int chunk_size, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "linear_cross_entropy_rows(Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weights, "
    "int ignore_index, float label_smoothing, float z_loss, int chunk_size) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "linear_cross_entropy_rows_backward(Tensor grad, Tensor x, Tensor weight, Tensor target, Tensor? bias, "
    "Tensor? class_weights, int ignore_index, float label_smoothing, float z_loss, int chunk_size, bool[] "
    "needs) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "linear_cross_entropy_scale(Tensor saved, Tensor grad, Tensor source, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _fake_sum(x: Tensor, weight: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wide = wide_dtype(x.dtype)
    needs_x, needs_weight, needs_bias = rest[-1]
    return (
        x.new_empty((), dtype=wide),
        x.new_empty(x.shape if needs_x else (0,)),
        x.new_empty(weight.shape, dtype=wide) if needs_weight else x.new_empty((0,)),
        x.new_empty(weight.shape[:1], dtype=wide) if needs_bias else x.new_empty((0,)),
    )


def _fake_rows(x: Tensor, weight: Tensor, target: Tensor, *_: Any) -> Tensor:
    return x.new_empty(target.shape, dtype=wide_dtype(x.dtype))


def _fake_rows_backward(
    grad: Tensor, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    needs_x, needs_weight, needs_bias = rest[-1]
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        (x if bias is None else bias).new_empty(weight.shape[:1] if needs_bias else (0,)),
    )


def _fake_scale(saved: Tensor, grad: Tensor, source: Tensor, dtype: torch.dtype) -> Tensor:
    return saved.new_empty(saved.shape, dtype=dtype)


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, bias = inputs[:4]
    _, dx, dw, db = output
    ctx.mark_non_differentiable(dx, dw, db)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dx, dw, db, x, weight, bias)
    ctx.needs = inputs[-1]


def _autograd_sum(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    none: tuple[None, ...] = (None,) * 10
    if grad is None:
        return none
    saved = ctx.saved_tensors
    dx, dw, db = (
        torch.ops.reformer_kernels.linear_cross_entropy_scale(unscaled, grad, source, source.dtype)
        if needed
        else None
        for unscaled, source, needed in zip(saved[:3], saved[3:], ctx.needs, strict=True)
    )
    return dx, dw, None, db, *none[4:]


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, target, bias, class_weights, *ctx.constants = inputs
    ctx.save_for_backward(x, weight, target, bias, class_weights)


def _autograd_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
    needs = [needs_x, needs_weight, needs_bias]
    results = torch.ops.reformer_kernels.linear_cross_entropy_rows_backward(
        grad, *ctx.saved_tensors, *ctx.constants, needs
    )
    dx, dw, db = (result if needed else None for result, needed in zip(results, needs, strict=True))
    return dx, dw, None, db, None, None, None, None, None


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(
        "linear_cross_entropy supports first derivatives only: use F.cross_entropy(F.linear(...)) where you "
        "need create_graph=True"
    )


for _name, _kernel, _fake in (
    ("linear_cross_entropy_sum", chunked.loss_sum, _fake_sum),
    ("linear_cross_entropy_rows", chunked.loss_rows, _fake_rows),
    ("linear_cross_entropy_rows_backward", chunked.loss_rows_backward, _fake_rows_backward),
    ("linear_cross_entropy_scale", chunked.scale_gradient, _fake_scale),
):
    _library.impl(_name, on_one_device(_name, _kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"reformer_kernels::{_name}", on_one_device(_name, _fake), lib=_library)
torch.library.register_autograd(
    "reformer_kernels::linear_cross_entropy_sum", _autograd_sum, setup_context=_setup_sum, lib=_library
)
torch.library.register_autograd(
    "reformer_kernels::linear_cross_entropy_rows", _autograd_rows, setup_context=_setup_rows, lib=_library
)
for _name in ("linear_cross_entropy_rows_backward", "linear_cross_entropy_scale"):
    torch.library.register_autograd(f"reformer_kernels::{_name}", _refuse_second_derivative, lib=_library)

"""Loss of a projection to the vocabulary, in chunks of rows: the logits exist one chunk at a time.

With logits l = x w' + b, p = softmax(l), lse = log sum exp l, V classes, class weights c, smoothing e, target
y:

    loss = (1 - e) c_y (lse - l_y) + (e / V) sum_k c_k (lse - l_k) + z c_y lse**2
    dl   = p ((1 - e) c_y + (e / V) sum_k c_k + 2 z c_y lse) - (1 - e) c_y [k = y] - (e / V) c_k

and dx = dl w, dw = dl' x, db = sum dl. `linear_cross_entropy_sum` (reductions "sum" and "mean") takes each
chunk from logits to gradients at once, in the forward pass: the three products that the whole logits would
need, and no more. `linear_cross_entropy_rows` (reduction "none") gives one loss a row; its backward makes the
logits again.

Logits, their softmax and all sums are in float32 (float64 for float64 input), whatever the input's dtype.
Ignored rows count as x = 0 with c_y = 0, so they give nothing, whatever they hold. Results do not depend on
anything but the input and the chunk size; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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

CACHED_BYTES = 2**20
"""Elementwise passes go over this much of the logits at a time, so that they find it in the cache."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class _Loss:
    """The terms of the loss that are the same for all chunks."""

    target: Tensor  # 0 at ignored rows
    counts: Tensor  # bool: not ignored
    target_weights: Tensor  # c_y, 0 at ignored rows
    class_weights: Tensor | None
    class_weights_sum: Tensor | float
    smoothing: float
    z_loss: float

    @classmethod
    def of(
        cls,
        target: Tensor,
        class_weights: Tensor | None,
        classes: int,
        ignore_index: int,
        smoothing: float,
        z_loss: float,
        dtype: torch.dtype,
    ) -> _Loss:
        counts = target != ignore_index
        target = target.where(counts, target.new_zeros(()))
        if class_weights is None:
            return cls(target, counts, counts.to(dtype), None, float(classes), smoothing, z_loss)
        class_weights = class_weights.to(dtype)
        weights = class_weights[target] * counts
        return cls(target, counts, weights, class_weights, class_weights.sum(), smoothing, z_loss)

    def consume(
        self, logits: Tensor, rows: slice, losses: Tensor | None, scale: Tensor | None, gradient: bool
    ) -> None:
        """Writes the losses of a block of rows; leaves its logits overwritten, if asked by their gradient.

        scale: (rows,) the gradient of each loss, or None for ones.
        """
        target, weights = self.target[rows].unsqueeze(1), self.target_weights[rows]
        largest = logits.amax(dim=1, keepdim=True)
        shifted = logits.sub_(largest)
        at_target = shifted.gather(1, target).squeeze(1)
        if self.smoothing and losses is not None:
            smooth = shifted.sum(1) if self.class_weights is None else torch.mv(shifted, self.class_weights)
        exponentials = shifted.exp_()
        sums = exponentials.sum(1)
        log_sums = sums.log()
        lse = log_sums + largest.squeeze(1)
        share = self.smoothing / logits.size(1)
        if losses is not None:
            row = (1 - self.smoothing) * weights * (log_sums - at_target)
            if self.smoothing:
                row += share * (self.class_weights_sum * log_sums - smooth) * self.counts[rows]
            if self.z_loss:
                row += self.z_loss * weights * lse.square()
            losses[rows] = row
        if not gradient:
            return
        of_softmax = (1 - self.smoothing) * weights
        of_target = -of_softmax
        smoothed = self.counts[rows].to(logits.dtype) * share
        if self.smoothing:
            of_softmax = of_softmax + smoothed * self.class_weights_sum
        if self.z_loss:
            of_softmax = of_softmax + 2 * self.z_loss * weights * lse
        if scale is not None:
            of_softmax, of_target, smoothed = of_softmax * scale, of_target * scale, smoothed * scale
        grad = exponentials.mul_((of_softmax / sums).unsqueeze(1))
        grad.scatter_add_(1, target, of_target.unsqueeze(1))
        if self.smoothing:
            if self.class_weights is None:
                grad.sub_(smoothed.unsqueeze(1))
            else:
                grad.addr_(smoothed, self.class_weights, alpha=-1)


def _walk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss: _Loss,
    chunk_size: int,
    losses: Tensor | None,
    scale: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Goes over the chunks: fills `losses` if given, and adds up the gradients that `needs` asks for."""
    wide = wide_dtype(x.dtype)
    rows, classes = x.size(0), weight.size(0)
    needs_x, needs_weight, needs_bias = needs
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else x.new_empty(0)
    dw = torch.zeros(weight.shape, dtype=wide, device=x.device) if needs_weight else x.new_empty(0)
    db = torch.zeros((classes,), dtype=wide, device=x.device) if needs_bias else x.new_empty(0)
    wide_weight = weight.to(wide)
    wide_bias = None if bias is None else bias.to(wide)
    room = torch.empty((min(chunk_size, rows), classes), dtype=wide, device=x.device)
    block = max(1, CACHED_BYTES // (classes * wide.itemsize)) if x.device.type == "cpu" else chunk_size
    for start in range(0, rows, chunk_size):
        size = min(chunk_size, rows - start)
        part = slice(start, start + size)
        inputs = x[part].to(wide)
        inputs = inputs.where(loss.counts[part].unsqueeze(1), inputs.new_zeros(()))
        logits = room[:size]
        if wide_bias is None:
            torch.mm(inputs, wide_weight.t(), out=logits)
        else:
            torch.addmm(wide_bias, inputs, wide_weight.t(), out=logits)
        for first in range(0, size, block):
            some = slice(start + first, min(start + first + block, start + size))
            loss.consume(
                logits[first : first + block],
                some,
                losses,
                None if scale is None else scale[some],
                any(needs),
            )
        if needs_x:
            dx[part] = torch.mm(logits, wide_weight)
        if needs_weight:
            dw.addmm_(logits.t(), inputs)
        if needs_bias:
            db.add_(logits.sum(0))
    return dx, dw, db


def _sum(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    chunk_size: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = wide_dtype(x.dtype)
    loss = _Loss.of(target, class_weights, weight.size(0), ignore_index, label_smoothing, z_loss, wide)
    losses = torch.empty(target.shape, dtype=wide, device=x.device)
    gradients = _walk(x, weight, bias, loss, chunk_size, losses, None, needs)
    # One float64 sum over the rows costs nothing and is the part of the error that would grow with them.
    return losses.sum(dtype=torch.float64).to(wide), *gradients


def _rows(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    chunk_size: int,
) -> Tensor:
    wide = wide_dtype(x.dtype)
    loss = _Loss.of(target, class_weights, weight.size(0), ignore_index, label_smoothing, z_loss, wide)
    losses = torch.empty(target.shape, dtype=wide, device=x.device)
    _walk(x, weight, bias, loss, chunk_size, losses, None, (False, False, False))
    return losses


def _rows_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    chunk_size: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(x.dtype)
    loss = _Loss.of(target, class_weights, weight.size(0), ignore_index, label_smoothing, z_loss, wide)
    dx, dw, db = _walk(x, weight, bias, loss, chunk_size, None, grad.to(wide), needs)
    return dx, dw.to(weight.dtype), db if bias is None else db.to(bias.dtype)


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
    of_x, of_weight, of_bias = (
        torch.ops.reformer_kernels.linear_cross_entropy_scale(unscaled, grad, source, source.dtype)
        if needed
        else None
        for unscaled, source, needed in zip(saved[:3], saved[3:], ctx.needs, strict=True)
    )
    return of_x, of_weight, None, of_bias, *none[4:]


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, target, bias, class_weights, *ctx.constants = inputs
    ctx.save_for_backward(x, weight, target, bias, class_weights)


def _autograd_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_x, of_weight, _, of_bias = ctx.needs_input_grad[:4]
    needs = [of_x, of_weight, of_bias]
    results = torch.ops.reformer_kernels.linear_cross_entropy_rows_backward(
        grad, *ctx.saved_tensors, *ctx.constants, needs
    )
    dx, dw, db = (result if needed else None for result, needed in zip(results, needs, strict=True))
    return dx, dw, None, db, None, None, None, None, None


def _scale(saved: Tensor, grad: Tensor, source: Tensor, dtype: torch.dtype) -> Tensor:
    """saved * grad; `source`, whose gradient `saved` is, is there so that a second derivative is noticed."""
    return (saved.to(grad.dtype) * grad).to(dtype)


def _no_second_order(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(
        "linear_cross_entropy supports first derivatives only: use F.cross_entropy(F.linear(...)) where you "
        "need create_graph=True"
    )


_library.define(
    "linear_cross_entropy_scale(Tensor saved, Tensor grad, Tensor source, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _name, _kernel, _fake in (
    ("linear_cross_entropy_sum", _sum, _fake_sum),
    ("linear_cross_entropy_rows", _rows, _fake_rows),
    ("linear_cross_entropy_rows_backward", _rows_backward, _fake_rows_backward),
    (
        "linear_cross_entropy_scale",
        _scale,
        _fake_scale,
    ),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"reformer_kernels::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "reformer_kernels::linear_cross_entropy_sum", _autograd_sum, setup_context=_setup_sum, lib=_library
)
torch.library.register_autograd(
    "reformer_kernels::linear_cross_entropy_rows", _autograd_rows, setup_context=_setup_rows, lib=_library
)
for _name in ("linear_cross_entropy_rows_backward", "linear_cross_entropy_scale"):
    torch.library.register_autograd(f"reformer_kernels::{_name}", _no_second_order, lib=_library)

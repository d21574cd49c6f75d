"""The loss of a projection to the vocabulary in chunks of rows: only one chunk of logits exists at a time.

With logits l = x w' + b, p = softmax(l), lse = log sum exp l, V classes, class weights c, smoothing e and
target y:

    loss = (1 - e) c_y (lse - l_y) + (e / V) sum_k c_k (lse - l_k) + z c_y lse**2
    dl   = p ((1 - e) c_y + (e / V) sum_k c_k + 2 z c_y lse) - (1 - e) c_y [k = y] - (e / V) c_k

and dx = dl w, dw = dl' x, db = sum dl. `loss_sum` (reductions "sum" and "mean") takes each chunk from logits
to gradients at once, in the forward pass: that is three matrix products, as many as the whole logits would
need. `loss_rows` (reduction "none") gives one loss for each row; its backward computes the logits again.

Logits, their softmax and all sums are in float32 (float64 for float64 input), whatever the input's dtype.
Ignored rows count as x = 0 with c_y = 0, so they contribute nothing, whatever they hold. Results depend on
the input and the chunk size alone, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_kernels._precision import wide_dtype

CACHED_BYTES = 2**20
"""On the CPU, elementwise passes take this much of the logits at a time, so that it stays in the cache."""


@dataclass
class LossTerms:
    """What the loss of every chunk is computed from, besides its logits."""

    target: Tensor  # (rows,) y, 0 at ignored rows
    counts: Tensor  # (rows,) bool, False at ignored rows
    target_weights: Tensor  # (rows,) c_y, 0 at ignored rows
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
    ) -> LossTerms:
        counts = target != ignore_index
        target = target.where(counts, target.new_zeros(()))
        if class_weights is None:
            return cls(target, counts, counts.to(dtype), None, float(classes), smoothing, z_loss)
        class_weights = class_weights.to(dtype)
        weights = class_weights[target] * counts
        return cls(target, counts, weights, class_weights, class_weights.sum(), smoothing, z_loss)

    def losses_and_gradient_(
        self, logits: Tensor, rows: slice, losses: Tensor | None, loss_grad: Tensor | None, gradient: bool
    ) -> None:
        """Writes the losses of these rows into `losses` and overwrites `logits`.

        With `gradient`, `logits` then hold the gradient of the logits. `loss_grad` (number of rows,) is the
        gradient of each loss; None means ones.
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
        softmax_factor = (1 - self.smoothing) * weights
        target_factor = -softmax_factor
        smoothing_factor = self.counts[rows].to(logits.dtype) * share
        if self.smoothing:
            softmax_factor = softmax_factor + smoothing_factor * self.class_weights_sum
        if self.z_loss:
            softmax_factor = softmax_factor + 2 * self.z_loss * weights * lse
        if loss_grad is not None:
            softmax_factor, target_factor, smoothing_factor = (
                factor * loss_grad for factor in (softmax_factor, target_factor, smoothing_factor)
            )
        grad = exponentials.mul_((softmax_factor / sums).unsqueeze(1))
        grad.scatter_add_(1, target, target_factor.unsqueeze(1))
        if self.smoothing:
            if self.class_weights is None:
                grad.sub_(smoothing_factor.unsqueeze(1))
            else:
                grad.addr_(smoothing_factor, self.class_weights, alpha=-1)


def _check(x: Tensor, weight: Tensor, chunk_size: int) -> None:
    """Raises ValueError for what the loops cannot go through; the public function checks more, for people."""
    if x.dim() != 2 or weight.dim() != 2 or weight.size(0) < 1:
        raise ValueError(
            f"x must be (rows, d) and weight (V, d) with at least one class, got shapes {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive number of rows, got {chunk_size}")


def _losses_and_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    terms: LossTerms,
    chunk_size: int,
    losses: Tensor | None,
    loss_grad: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Goes through the chunks: fills `losses` if given, and returns the gradients that `needs` asks for.

    These are the gradients of x, weight and bias; an empty tensor where `needs` says False.
    """
    wide = wide_dtype(x.dtype)
    rows, classes = x.size(0), weight.size(0)
    needs_x, needs_weight, needs_bias = needs
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else x.new_empty(0)
    dw = torch.zeros(weight.shape, dtype=wide, device=x.device) if needs_weight else x.new_empty(0)
    db = torch.zeros((classes,), dtype=wide, device=x.device) if needs_bias else x.new_empty(0)
    wide_weight = weight.to(wide)
    wide_bias = None if bias is None else bias.to(wide)
    logits_buffer = torch.empty((min(chunk_size, rows), classes), dtype=wide, device=x.device)
    block_rows = max(1, CACHED_BYTES // (classes * wide.itemsize)) if x.device.type == "cpu" else chunk_size
    for start in range(0, rows, chunk_size):
        size = min(chunk_size, rows - start)
        chunk = slice(start, start + size)
        inputs = x[chunk].to(wide)
        inputs = inputs.where(terms.counts[chunk].unsqueeze(1), inputs.new_zeros(()))
        logits = logits_buffer[:size]
        if wide_bias is None:
            torch.mm(inputs, wide_weight.t(), out=logits)
        else:
            torch.addmm(wide_bias, inputs, wide_weight.t(), out=logits)
        for first in range(0, size, block_rows):
            block = slice(start + first, min(start + first + block_rows, start + size))
            terms.losses_and_gradient_(
                logits[first : first + block_rows],
                block,
                losses,
                None if loss_grad is None else loss_grad[block],
                any(needs),
            )
        if needs_x:
            dx[chunk] = torch.mm(logits, wide_weight)
        if needs_weight:
            dw.addmm_(logits.t(), inputs)
        if needs_bias:
            db.add_(logits.sum(0))
    return dx, dw, db


def loss_sum(
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
    """The sum of the losses, and the gradients of x, weight and bias that `needs` asks for.

    The gradients of weight and bias are in the precision of the sums.
    """
    _check(x, weight, chunk_size)
    wide = wide_dtype(x.dtype)
    terms = LossTerms.of(target, class_weights, weight.size(0), ignore_index, label_smoothing, z_loss, wide)
    losses = torch.empty(target.shape, dtype=wide, device=x.device)
    gradients = _losses_and_gradients(x, weight, bias, terms, chunk_size, losses, None, needs)
    # The sum over rows is the one error that would grow with their number; float64 removes it at no cost.
    return losses.sum(dtype=torch.float64).to(wide), *gradients


def loss_rows(
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
    """The loss of each row."""
    _check(x, weight, chunk_size)
    wide = wide_dtype(x.dtype)
    terms = LossTerms.of(target, class_weights, weight.size(0), ignore_index, label_smoothing, z_loss, wide)
    losses = torch.empty(target.shape, dtype=wide, device=x.device)
    _losses_and_gradients(x, weight, bias, terms, chunk_size, losses, None, (False, False, False))
    return losses


def loss_rows_backward(
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
    """The gradients of x, weight and bias from that of each row's loss."""
    _check(x, weight, chunk_size)
    wide = wide_dtype(x.dtype)
    terms = LossTerms.of(target, class_weights, weight.size(0), ignore_index, label_smoothing, z_loss, wide)
    dx, dw, db = _losses_and_gradients(x, weight, bias, terms, chunk_size, None, grad.to(wide), needs)
    return dx, dw.to(weight.dtype), db if bias is None else db.to(bias.dtype)


def scale_gradient(saved: Tensor, grad: Tensor, source: Tensor, dtype: torch.dtype) -> Tensor:
    """saved * grad in `dtype`, where `saved` is the gradient of `source` for a loss gradient of 1.

    `source` is an argument so that autograd notices when a second derivative is asked for.
    """
    return (saved.to(grad.dtype) * grad).to(dtype)

"""What the operators of attention over sorted orders have in common on all back ends.

`<back end>_attention` returns out (B, H, L, D_v) in q's dtype and the log-sum-exp (B, H, L) in float32, both
differentiable. The arguments are those of `reference.attention`, the rule as `AttentionRule.pack()` gives it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from reformer_kernels._limits import MAX_HEAD_DIM
from reformer_kernels.config import KEY_NORMS, MAX_CHUNK_LENGTH, MAX_NEIGHBOURS, AttentionRule

_ARGUMENTS = (
    "Tensor q, Tensor? k, Tensor v, Tensor order, Tensor bucket_starts, Tensor? key_bias, Tensor? seed, "
    "int[] rule, float scale, float dropout_p, Tensor? key_order=None, Tensor? key_bucket_starts=None"
)


def empty_rows_like(tensor: Tensor) -> Tensor:
    """Uninitialised memory in the layout of `tensor`, so that a transposed view of a projection's output
    gets a result that transposes back for free; the last dimension is contiguous in any case."""
    result = torch.empty_like(tensor)
    return (
        result
        if result.stride(-1) == 1 or result.size(-1) == 1
        else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    )


def empty_out(q: Tensor, v: Tensor, key_order: Tensor | None) -> Tensor:
    """Uninitialised (B, H, L, Dv), its heads inside rows where v's are."""
    if key_order is None:
        return empty_rows_like(v)
    batch, heads, length = q.shape[:3]
    if v.stride(1) < v.stride(2):
        return v.new_empty((batch, length, heads, v.size(3))).transpose(1, 2)
    return v.new_empty((batch, heads, length, v.size(3)))


def contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.size(-1) == 1 else tensor.contiguous()


RULE_FIELDS = [field.name for field in dataclasses.fields(AttentionRule)]


def check_sizes(q: Tensor, v: Tensor, order: Tensor, bucket_starts: Tensor) -> None:
    """What `_native.pointer` cannot tell from one tensor. The public functions' checks say it better."""
    for name, x in (("q", q), ("v", v), ("order", order), ("bucket_starts", bucket_starts)):
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(x.shape)}")
    for name, x in (("q", q), ("v", v)):
        if not 1 <= x.size(-1) <= MAX_HEAD_DIM:
            raise ValueError(f"{name}'s last dimension must be in 1..{MAX_HEAD_DIM}, got {x.size(-1)}")
    if order.size(2) < 1 or bucket_starts.size(3) < 2:
        raise ValueError(
            "order must have a round, and bucket_starts two entries or more, got shapes "
            f"{tuple(order.shape)} and {tuple(bucket_starts.shape)}"
        )


def check_options(rule: list[int], scale: float, dropout_p: float, separate: bool) -> None:
    if len(rule) != len(RULE_FIELDS):
        raise ValueError(f"rule must be what AttentionRule.pack() gives, got {rule}")
    fields = AttentionRule(*rule)  # type: ignore[arg-type]
    sizes = {
        "chunk_length": (1, MAX_CHUNK_LENGTH),
        "chunks_before": (0, MAX_NEIGHBOURS),
        "chunks_after": (0, MAX_NEIGHBOURS),
        "window_before": (0, MAX_CHUNK_LENGTH * MAX_NEIGHBOURS * 4),
        "window_after": (0, MAX_CHUNK_LENGTH * MAX_NEIGHBOURS * 4),
        "key_norm": (0, len(KEY_NORMS) - 1),
    }
    for name, (low, high) in sizes.items():
        if not low <= getattr(fields, name) <= high:
            raise ValueError(f"rule.{name} must be in {low}..{high}, got {getattr(fields, name)}")
    if separate and (not fields.rank_window or fields.ring or fields.exclude_self):
        raise ValueError(
            f"a rule for keys sorted apart must have rank_window, no ring and no exclude_self, got {fields}"
        )
    if not math.isfinite(scale) or not 0 <= dropout_p < 1:
        raise ValueError(
            f"scale must be finite and dropout_p in [0, 1), got scale {scale} and dropout_p {dropout_p}"
        )


def define(backend: str) -> None:
    """Defines `<backend>_attention` and `<backend>_attention_backward`: schema, fake kernel, gradient."""
    forward, backward = (
        f"reformer_kernels::{backend}_attention",
        f"reformer_kernels::{backend}_attention_backward",
    )
    torch.library.define(forward, f"({_ARGUMENTS}) -> (Tensor out, Tensor lse)")
    torch.library.define(
        backward,
        f"(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_ARGUMENTS}) "
        "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    )
    torch.library.register_fake(forward, _fake_forward)
    torch.library.register_fake(backward, _fake_backward)

    def differentiate(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_lse is None:
            return (None,) * 12
        *saved, key_order, key_starts = ctx.saved_tensors  # once: torch.utils.checkpoint gives them once
        operator = getattr(torch.ops.reformer_kernels, f"{backend}_attention_backward")
        grad_q, grad_k, grad_v = operator(grad_out, grad_lse, *saved, *ctx.options, key_order, key_starts)
        has_k = saved[3] is not None
        return grad_q, grad_k if has_k else None, grad_v, *(None,) * 9

    def no_double_backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"reformer_kernels: attention's {backend} kernels have no second derivative; use "
            'backend="reference" for double backward'
        )

    torch.library.register_autograd(forward, differentiate, setup_context=_setup_context)
    torch.library.register_autograd(backward, no_double_backward)


def _fake_forward(q, k, v, *rest):  # type: ignore[no-untyped-def]
    key_order = rest[7] if len(rest) > 7 else None
    return empty_out(q, v, key_order), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def _fake_backward(grad_out, grad_lse, out, lse, q, k, v, *rest):  # type: ignore[no-untyped-def]
    return empty_rows_like(q), q.new_empty(0) if k is None else empty_rows_like(k), empty_rows_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, order, bucket_starts, key_bias, seed, rule, scale, dropout_p, *keys = inputs
    ctx.save_for_backward(*output, q, k, v, order, bucket_starts, key_bias, seed, *keys)
    ctx.options = (rule, scale, dropout_p)
    ctx.set_materialize_grads(False)

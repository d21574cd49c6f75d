"""Operators of attention over sorted orders on the CPU: schema, fake kernel and autograd formula.

`native_attention` returns out (B, H, L, D_v) in q's dtype and the log-sum-exp (B, H, L) in float32, both
differentiable. The arguments are those of `reference.attention`, the rule as `AttentionRule.pack()` gives it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from reformer_kernels import _native
from reformer_kernels.config import KEY_NORMS, MAX_CHUNK_LENGTH, MAX_NEIGHBOURS, AttentionRule

MAX_HEAD_DIM = 256
"""Of q, k and v: kernels keep a row on the stack."""

_ARGUMENTS = (
    "Tensor q, Tensor? k, Tensor v, Tensor order, Tensor bucket_starts, Tensor? key_bias, Tensor? seed, "
    "int[] rule, float scale, float dropout_p, Tensor? key_order=None, Tensor? key_bucket_starts=None"
)
torch.library.define("reformer_kernels::native_attention", f"({_ARGUMENTS}) -> (Tensor out, Tensor lse)")
torch.library.define(
    "reformer_kernels::native_attention_backward",
    f"(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_ARGUMENTS}) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
)


def _empty_rows_like(tensor: Tensor) -> Tensor:
    """Uninitialised memory in the layout of `tensor`, so that a transposed view of a projection's output
    gets a result that transposes back for free; the last dimension is contiguous in any case."""
    result = torch.empty_like(tensor)
    return (
        result
        if result.stride(-1) == 1 or result.size(-1) == 1
        else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    )


def _empty_out(q: Tensor, v: Tensor, key_order: Tensor | None) -> Tensor:
    """Uninitialised (B, H, L, Dv), its heads inside rows where v's are."""
    if key_order is None:
        return _empty_rows_like(v)
    batch, heads, length = q.shape[:3]
    if v.stride(1) < v.stride(2):
        return v.new_empty((batch, length, heads, v.size(3))).transpose(1, 2)
    return v.new_empty((batch, heads, length, v.size(3)))


def _contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.size(-1) == 1 else tensor.contiguous()


_RULE_FIELDS = [field.name for field in dataclasses.fields(AttentionRule)]


def _check_sizes(q: Tensor, v: Tensor, order: Tensor, bucket_starts: Tensor) -> None:
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


def _check_options(rule: list[int], scale: float, dropout_p: float, separate: bool) -> None:
    if len(rule) != len(_RULE_FIELDS):
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
    if separate and (not fields.bucket_window or fields.ring or fields.exclude_self):
        raise ValueError(
            f"a rule for keys sorted apart must have bucket_window, no ring and no exclude_self, got {fields}"
        )
    if not math.isfinite(scale) or not 0 <= dropout_p < 1:
        raise ValueError(
            f"scale must be finite and dropout_p in [0, 1), got scale {scale} and dropout_p {dropout_p}"
        )


def _parameters(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    order: Tensor,
    bucket_starts: Tensor,
    key_bias: Tensor | None,
    seed: Tensor | None,
    rule: list[int],
    scale: float,
    dropout_p: float,
    key_order: Tensor | None,
    key_bucket_starts: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> Any:
    """The kernels' parameter struct. The caller keeps every tensor alive while it is used."""
    native = _native.extension()
    _check_sizes(q, v, order, bucket_starts)
    separate = key_order is not None
    if separate != (key_bucket_starts is not None) or (separate and k is None):
        raise ValueError("key_order, key_bucket_starts and k come together where keys are sorted apart")
    _check_options(rule, scale, dropout_p, separate)
    batch, heads, length, dim = q.shape
    key_length = v.size(2) if separate else length
    rounds, starts_size = order.size(2), bucket_starts.size(-1)
    dtypes = [q.dtype] if q.dtype in _native.DTYPES else list(_native.DTYPES)
    int32, float32 = [torch.int32], [torch.float32]
    return native.AttentionParams(
        B=batch,
        H=heads,
        L=length,
        Lk=key_length,
        D=dim,
        Dv=v.size(-1),
        R=rounds,
        dtype=_native.DTYPES.get(q.dtype, -1),
        q=_native.rows(q, "q", shape=q.shape, dtypes=dtypes),
        k=native.Rows()
        if k is None
        else _native.rows(k, "k", shape=(batch, heads, key_length, dim), dtypes=dtypes),
        v=_native.rows(v, "v", shape=(batch, heads, key_length, v.size(-1)), dtypes=dtypes),
        order=_native.pointer(order, "order", shape=(batch, heads, rounds, length), dtypes=int32),
        starts=_native.pointer(
            bucket_starts, "bucket_starts", shape=(batch, heads, rounds, starts_size), dtypes=int32
        ),
        key_order=0
        if key_order is None
        else _native.pointer(key_order, "key_order", shape=(batch, heads, rounds, key_length), dtypes=int32),
        key_starts=0
        if key_bucket_starts is None
        else _native.pointer(
            key_bucket_starts, "key_bucket_starts", shape=(batch, heads, rounds, starts_size), dtypes=int32
        ),
        starts_size=starts_size,
        key_bias=0
        if key_bias is None
        else _native.pointer(key_bias, "key_bias", shape=(batch, key_length), dtypes=float32),
        rule=native.AttentionRule(**dict(zip(_RULE_FIELDS, rule, strict=True))),
        scale=scale,
        dropout_threshold=min(int(dropout_p * 2**32), 2**32 - 1),
        keep_scale=1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0,
        seed=0 if seed is None else int(seed) & (2**64 - 1),
        out=_native.rows(out, "out", shape=(*q.shape[:3], v.size(-1)), dtypes=dtypes),
        lse=_native.pointer(lse, "lse", shape=(batch, heads, length), dtypes=float32),
        threads=_native.threads(),
    )


def _workspace(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)  # torch aligns CPU memory to 64 bytes


@torch.library.impl("reformer_kernels::native_attention", "CPU")
def _(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    order: Tensor,
    bucket_starts: Tensor,
    key_bias: Tensor | None,
    seed: Tensor | None,
    rule: list[int],
    scale: float,
    dropout_p: float,
    key_order: Tensor | None = None,
    key_bucket_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    native = _native.extension()
    q, v = _contiguous_rows(q), _contiguous_rows(v)
    k = None if k is None else _contiguous_rows(k)
    out, lse = _empty_out(q, v, key_order), torch.empty(q.shape[:3], dtype=torch.float32)
    parameters = _parameters(
        q, k, v, order, bucket_starts, key_bias, seed, rule, scale, dropout_p, key_order, key_bucket_starts,
        out, lse,
    )  # fmt: skip

    workspace = _workspace(native.attention_forward_workspace_bytes(parameters))
    parameters.workspace = _native.pointer(
        workspace, "workspace", shape=workspace.shape, dtypes=[torch.uint8]
    )
    native.attention_forward(parameters)
    return out, lse


@torch.library.register_fake("reformer_kernels::native_attention")
def _(q, k, v, *rest):  # type: ignore[no-untyped-def]
    key_order = rest[7] if len(rest) > 7 else None
    return _empty_out(q, v, key_order), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


@torch.library.impl("reformer_kernels::native_attention_backward", "CPU")
def _(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    order: Tensor,
    bucket_starts: Tensor,
    key_bias: Tensor | None,
    seed: Tensor | None,
    rule: list[int],
    scale: float,
    dropout_p: float,
    key_order: Tensor | None = None,
    key_bucket_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    native = _native.extension()
    q, v = _contiguous_rows(q), _contiguous_rows(v)
    k = None if k is None else _contiguous_rows(k)
    grad_out = torch.zeros_like(out) if grad_out is None else _contiguous_rows(grad_out)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grad_q, grad_v = _empty_rows_like(q), _empty_rows_like(v)
    grad_k = q.new_empty(0) if k is None else _empty_rows_like(k)
    parameters = _parameters(
        q, k, v, order, bucket_starts, key_bias, seed, rule, scale, dropout_p, key_order, key_bucket_starts,
        out, lse,
    )  # fmt: skip

    gradients = native.AttentionGradients(
        grad_out=_native.rows(grad_out, "grad_out", shape=out.shape, dtypes=[q.dtype]),
        grad_lse=0
        if grad_lse is None
        else _native.pointer(grad_lse, "grad_lse", shape=lse.shape, dtypes=[torch.float32]),
        grad_q=_native.rows(grad_q, "grad_q", shape=q.shape, dtypes=[q.dtype]),
        grad_k=native.Rows()
        if k is None
        else _native.rows(grad_k, "grad_k", shape=k.shape, dtypes=[q.dtype]),
        grad_v=_native.rows(grad_v, "grad_v", shape=v.shape, dtypes=[q.dtype]),
    )
    workspace = _workspace(native.attention_backward_workspace_bytes(parameters))
    parameters.workspace = _native.pointer(
        workspace, "workspace", shape=workspace.shape, dtypes=[torch.uint8]
    )
    native.attention_backward(parameters, gradients)
    return grad_q, grad_k, grad_v


@torch.library.register_fake("reformer_kernels::native_attention_backward")
def _(grad_out, grad_lse, out, lse, q, k, v, *rest):  # type: ignore[no-untyped-def]
    return _empty_rows_like(q), q.new_empty(0) if k is None else _empty_rows_like(k), _empty_rows_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, order, bucket_starts, key_bias, seed, rule, scale, dropout_p, *keys = inputs
    ctx.save_for_backward(*output, q, k, v, order, bucket_starts, key_bias, seed, *keys)
    ctx.options = (rule, scale, dropout_p)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_lse is None:
        return (None,) * 12
    *saved, key_order, key_starts = ctx.saved_tensors  # once: torch.utils.checkpoint gives them once
    grad_q, grad_k, grad_v = torch.ops.reformer_kernels.native_attention_backward(
        grad_out, grad_lse, *saved, *ctx.options, key_order, key_starts
    )
    has_k = saved[3] is not None
    return grad_q, grad_k if has_k else None, grad_v, *(None,) * 9


torch.library.register_autograd("reformer_kernels::native_attention", _backward, setup_context=_setup_context)


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "reformer_kernels: attention's native kernels have no second derivative; use "
        'backend="reference" for double backward'
    )


torch.library.register_autograd("reformer_kernels::native_attention_backward", _no_double_backward)

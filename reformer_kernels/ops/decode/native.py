"""A step of cached generation in C++, on the CPU: see csrc/kernels.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reformer_kernels import _native
from reformer_kernels.ops.decode.reference import Step

_FLOATS = tuple(_native.DTYPES)


def decode_step(step: Step) -> Tensor:
    """The result of `reference.decode_step` for a step whose shapes agree.

    Raises TypeError or ValueError for tensors of a dtype, shape or stride that the kernel does not take.
    """
    native = _native.extension()
    q, v, keys, values = step.q, step.v, step.keys, step.values
    B, H, room, D = keys.shape
    D_v = values.size(3)
    out = torch.empty((B, H, 1, D_v), dtype=q.dtype, device="cpu")
    dtypes = (q.dtype,) if q.dtype in _native.DTYPES else _FLOATS
    params = native.DecodeParams(
        B=B,
        H=H,
        D=D,
        Dv=D_v,
        R=1,
        dtype=_native.DTYPES.get(q.dtype, 0),
        q=_native.rows(q, "q", shape=(B, H, 1, D), dtypes=dtypes),
        v=_native.rows(v, "v", shape=(B, H, 1, D_v), dtypes=dtypes),
        out=_native.rows(out, "out", shape=(B, H, 1, D_v), dtypes=dtypes),
        key_dtype=_native.DTYPES.get(keys.dtype, 0),
        value_dtype=_native.DTYPES.get(values.dtype, 0),
        keys=_native.pointer(keys, "keys", shape=(B, H, room, D), dtypes=_FLOATS),
        values=_native.pointer(values, "values", shape=(B, H, room, D_v), dtypes=_FLOATS),
        room=room,
        capacity=step.capacity,
        lengths=_native.pointer(step.lengths, "lengths", shape=(B,), dtypes=(torch.int64,)),
        rule=native.AttentionRule(*step.rule),
        scale=step.scale,
        threads=_native.threads(),
    )
    if step.k is not None:
        params.k = _native.rows(step.k, "k", shape=(B, H, 1, D), dtypes=dtypes)
    factors = torch.tensor(step.factors, dtype=torch.int32, device="cpu")
    if step.buckets is not None:
        _add_buckets(params, step, factors)
    native.decode_step(params)
    return out


def _add_buckets(params: Any, step: Step, factors: Tensor) -> None:
    hashed, rotations, buckets = _given(step.hashed), _given(step.rotations), _given(step.buckets)
    order, starts, recent = _given(step.order), _given(step.starts), _given(step.recent)
    B, H, D = params.B, params.H, params.D
    R, capacity = buckets.shape[2:]

    def address(tensor: Tensor, name: str, shape: Sequence[int]) -> int:
        return _native.pointer(tensor, name, shape=shape, dtypes=(torch.int32,))

    params.R = R
    params.hashed = _native.rows(hashed, "hashed", shape=(B, H, 1, D), dtypes=(step.q.dtype,))
    heads, width = rotations.size(0), rotations.size(3)
    params.rotations = _native.pointer(
        rotations, "rotations", shape=(heads, D, R, width), dtypes=(torch.float32,)
    )
    params.rotation_heads, params.rotation_width = heads, width
    params.factors, params.n_factors = address(factors, "factors", factors.shape), factors.numel()
    params.buckets = address(buckets, "buckets", (B, H, R, capacity))
    params.order = address(order, "order", (B, H, R, order.size(3)))
    params.starts = address(starts, "starts", (B, H, R, starts.size(3)))
    params.order_size, params.starts_size = order.size(3), starts.size(3)
    params.recent = address(recent, "recent", (B, H, R, recent.size(3)))
    params.recent_buckets = address(_given(step.recent_buckets), "recent_buckets", recent.shape)
    params.recent_size, params.recent_count = recent.size(3), step.recent_count


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor

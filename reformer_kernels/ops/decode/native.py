"""A step of cached generation in C++, on the CPU: see csrc/kernels.h."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reformer_kernels import _native
from reformer_kernels._limits import MAX_HEAD_DIM
from reformer_kernels.ops.decode.reference import Step

_FLOATS = tuple(_native.DTYPES)


class Prepared:
    """The kernel's parameters for one cache, whose tensors are checked once and kept alive.

    Raises TypeError or ValueError for tensors of a dtype, shape or stride that the kernel does not take.
    """

    def __init__(self, step: Step) -> None:
        self._tensors = step.cache_tensors()
        self._factors = torch.tensor(step.factors, dtype=torch.int32, device="cpu")
        self._params = _cache_parameters(step, self._factors)
        B, H, _, D = step.keys.shape
        self._key_shape, self._value_shape = (B, H, 1, D), (B, H, 1, step.values.size(3))

    def is_for(self, step: Step) -> bool:
        """Whether the step's cache is made of the tensors that were checked."""
        return all(a is b for a, b in zip(self._tensors, step.cache_tensors(), strict=True))

    def run(self, step: Step) -> Tensor:
        """The result of `reference.decode_step`."""
        q, params, dtypes = step.q, self._params, (step.q.dtype,)
        out = torch.empty(self._value_shape, dtype=q.dtype, device="cpu")
        params.q = _native.rows(q, "q", shape=self._key_shape, dtypes=_FLOATS)
        params.v = _native.rows(step.v, "v", shape=self._value_shape, dtypes=dtypes)
        params.out = _native.rows(out, "out", shape=self._value_shape, dtypes=dtypes)
        if step.k is not None:
            params.k = _native.rows(step.k, "k", shape=self._key_shape, dtypes=dtypes)
        if step.hashed is not None:
            params.hashed = _native.rows(step.hashed, "hashed", shape=self._key_shape, dtypes=dtypes)
        params.dtype = _native.DTYPES[q.dtype]
        params.recent_count = step.recent_count
        params.threads = _native.threads()
        _native.extension().decode_step(params)
        return out


def _cache_parameters(step: Step, factors: Tensor) -> Any:
    native, keys, values = _native.extension(), step.keys, step.values
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.dim() != 4 or not 1 <= tensor.size(3) <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must be (B, H, room, 1..{MAX_HEAD_DIM}), got shape {tuple(tensor.shape)}"
            )
    B, H, room, D = keys.shape
    D_v = values.size(3)
    params = native.DecodeParams(
        B=B,
        H=H,
        D=D,
        Dv=D_v,
        R=1,
        keys=_native.pointer(keys, "keys", shape=(B, H, room, D), dtypes=_FLOATS),
        values=_native.pointer(values, "values", shape=(B, H, room, D_v), dtypes=_FLOATS),
        key_dtype=_native.DTYPES[keys.dtype],
        value_dtype=_native.DTYPES[values.dtype],
        room=room,
        capacity=step.capacity,
        lengths=_native.pointer(step.lengths, "lengths", shape=(B,), dtypes=(torch.int64,)),
        rule=native.AttentionRule(*step.rule),
        scale=step.scale,
    )
    if step.buckets is not None:
        _add_buckets(params, step, factors)
    return params


def _add_buckets(params: Any, step: Step, factors: Tensor) -> None:
    rotations, buckets, order = _given(step.rotations), _given(step.buckets), _given(step.order)
    starts, recent, recent_buckets = _given(step.starts), _given(step.recent), _given(step.recent_buckets)
    B, H, D = params.B, params.H, params.D
    heads, _, R, width = rotations.shape
    n_buckets = math.prod(step.factors)
    if heads not in (1, H):
        raise ValueError(f"rotations must be of 1 or {H} heads, got {heads}")
    if not step.factors or any(factor < 2 or factor % 2 for factor in step.factors):
        raise ValueError(f"bucket factors must be positive even numbers, got {list(step.factors)}")
    if sum(step.factors) > 2 * width:
        raise ValueError(
            f"bucket factors {list(step.factors)} need {sum(step.factors) // 2} rotation columns, got {width}"
        )
    if starts.size(-1) < n_buckets + 1:
        raise ValueError(f"starts must have {n_buckets + 1} entries or more, got {starts.size(-1)}")

    def address(tensor: Tensor, name: str, shape: Sequence[int]) -> int:
        return _native.pointer(tensor, name, shape=shape, dtypes=(torch.int32,))

    params.R = R
    params.rotations = _native.pointer(
        rotations, "rotations", shape=(heads, D, R, width), dtypes=(torch.float32,)
    )
    params.rotation_heads, params.rotation_width = heads, width
    params.factors, params.n_factors = address(factors, "factors", factors.shape), factors.numel()
    params.buckets = address(buckets, "buckets", (B, H, R, step.capacity))
    params.order = address(order, "order", (B, H, R, order.size(-1)))
    params.starts = address(starts, "starts", (B, H, R, starts.size(-1)))
    params.order_size, params.starts_size = order.size(-1), starts.size(-1)
    params.recent = address(recent, "recent", (B, H, R, recent.size(-1)))
    params.recent_buckets = address(recent_buckets, "recent_buckets", recent.shape)
    params.recent_size = recent.size(-1)


def _given(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("a step with buckets needs rotations and every part of the order")
    return tensor

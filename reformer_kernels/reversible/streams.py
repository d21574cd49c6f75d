"""The two residual streams of a reversible sequence, in floating point or in fixed point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from reformer_kernels.ops.residual import op as op  # registers the operators
from reformer_kernels.ops.residual import reference
from reformer_kernels.reversible import fused_norm as _fused_norm
from reformer_kernels.reversible.fused_norm import Normed

Norm = nn.LayerNorm | nn.RMSNorm


class Streams(Protocol):
    """Two streams, numbered 0 and 1, updated in place."""

    tensors: tuple[Tensor, Tensor]  # their whole state

    def value(self, which: int) -> Tensor:
        """The stream as a module's input: no gradient, valid until the stream's next update."""
        ...

    def update(self, which: int, delta: Tensor, sign: int, norm: Norm | None = None) -> None:
        """stream += sign * delta, in place; with `norm`, `normed` will be asked for this stream next."""
        ...

    def normed(self, which: int, norm: Norm) -> Normed | None:
        """The stream normalised, where a kernel of ours computes that; None: the module must."""
        ...

    def memory(self) -> tuple[Tensor, ...]:
        """The tensors that updates change and `value` gives out."""
        ...


class StreamKind(Protocol):
    """How one call of a sequence keeps its streams."""

    dtype: torch.dtype  # of module inputs and of results

    def start(self, first: Tensor, second: Tensor) -> Streams:
        """Streams with these values, in memory of their own."""
        ...

    def finish(self, streams: Streams, joined: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Results for the caller (one tensor if joined along the last dimension, else two), and what `resume`
        needs. The two may share memory; nothing else may."""
        ...

    def resume(self, saved: Sequence[Tensor]) -> Streams:
        """The finished streams again, in memory of their own."""
        ...


class _Steps:
    """The streams' tensors, and their steps by the kind's back end: "reference", "native", ..."""

    __slots__ = ("_normed", "kind", "tensors")

    def __init__(self, kind: FloatKind | FixedKind, first: Tensor, second: Tensor) -> None:
        self.kind = kind
        self.tensors = (first, second)
        self._normed: list[Normed | None] = [None, None]

    def _step(self, which: int, delta: Tensor | None, sign: int, norm: Norm | None) -> Tensor:
        """One pass of the operator over a stream; gives its value (of fixed-point streams)."""
        kind = self.kind
        operator = getattr(torch.ops.reformer_kernels, f"{kind.backend}_residual_step")
        fixed = (kind.scale, kind.flag) if isinstance(kind, FixedKind) else (None, None)
        settings = ("none", None, None, 0.0) if norm is None else _fused_norm.settings(norm, kind.dtype)
        value: Tensor
        value, *normed = operator(self.tensors[which], delta, sign, *fixed, kind.dtype, *settings)
        self._normed[which] = None if norm is None else Normed(settings[0], *normed)
        return value

    def normed(self, which: int, norm: Norm) -> Normed | None:
        if self.kind.backend == "reference":
            return None
        if self._normed[which] is None:
            self._step(which, None, 1, norm)
        normed, self._normed[which] = self._normed[which], None
        return normed


class FloatStreams(_Steps):
    """Streams in their own dtype: an update is one addition, rounded (the paper's arithmetic)."""

    __slots__ = ()

    def value(self, which: int) -> Tensor:
        return self.tensors[which]

    def update(self, which: int, delta: Tensor, sign: int, norm: Norm | None = None) -> None:
        self._normed[which] = None
        if norm is None or self.kind.backend == "reference":
            self.tensors[which].add_(delta, alpha=sign)
        else:
            self._step(which, delta, sign, norm)

    def memory(self) -> tuple[Tensor, ...]:
        return self.tensors


class FloatKind:
    """`backend`: of steps that normalise; others are torch's additions."""

    def __init__(self, dtype: torch.dtype, backend: str = "reference") -> None:
        self.dtype = dtype
        self.backend = backend

    def start(self, first: Tensor, second: Tensor) -> FloatStreams:
        return FloatStreams(self, _copied(first, self.dtype), _copied(second, self.dtype))

    def finish(self, streams: Streams, joined: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        assert isinstance(streams, FloatStreams)
        results = (torch.cat(streams.tensors, dim=-1),) if joined else streams.tensors
        return results, results

    def resume(self, saved: Sequence[Tensor]) -> FloatStreams:
        first, second = saved[0].chunk(2, dim=-1) if len(saved) == 1 else saved
        return self.start(first, second)


class FixedStreams(_Steps):
    """Streams as int32 multiples of 1 / scale: subtracting undoes adding to the last bit."""

    __slots__ = ("values",)
    kind: FixedKind

    def __init__(self, kind: FixedKind, first: Tensor, second: Tensor) -> None:
        super().__init__(kind, first, second)
        self.values: list[Tensor | None] = [None, None]

    def value(self, which: int) -> Tensor:
        value = self.values[which]
        if value is None:
            if self.kind.backend == "reference":
                value = reference.fixed_point_decode(self.tensors[which], self.kind.scale, self.kind.dtype)
            else:
                value = self._step(which, None, 1, None)
            self.values[which] = value
        return value

    def update(self, which: int, delta: Tensor, sign: int, norm: Norm | None = None) -> None:
        # The other stream's value was the input that gave `delta`; it is not read again before it changes.
        self.values = [None, None]
        if self.kind.backend == "reference":
            reference.fixed_point_add_(self.tensors[which], delta, self.kind.scale, sign, self.kind.flag)
        else:
            self.values[which] = self._step(which, delta, sign, norm)

    def memory(self) -> tuple[Tensor, ...]:
        return ()


class FixedKind:
    """`flag` (int32, one element, on the streams' device) becomes 1 when a value leaves int32's range.

    `backend`: "native" or "reference", which agree to the last bit.
    """

    scale: Tensor

    def __init__(self, dtype: torch.dtype, scale: float | None, flag: Tensor, backend: str) -> None:
        self.dtype = dtype
        self.given_scale = scale
        self.flag = flag
        self.backend = backend

    def start(self, first: Tensor, second: Tensor) -> FixedStreams:
        if self.given_scale is None:
            self.scale = reference.automatic_scale(first, second)
        else:
            self.scale = torch.full((), self.given_scale, dtype=torch.float32, device=first.device)
        return FixedStreams(
            self,
            reference.fixed_point_encode(first.contiguous(), self.scale, self.flag),
            reference.fixed_point_encode(second.contiguous(), self.scale, self.flag),
        )

    def finish(self, streams: Streams, joined: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        assert isinstance(streams, FixedStreams)
        results = (streams.value(0), streams.value(1))
        return (torch.cat(results, dim=-1),) if joined else results, streams.tensors

    def resume(self, saved: Sequence[Tensor]) -> FixedStreams:
        return FixedStreams(self, saved[0].clone(), saved[1].clone())


def _copied(values: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(values.shape, dtype=dtype, device=values.device).copy_(values)

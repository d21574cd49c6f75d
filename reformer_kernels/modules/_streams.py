"""The two residual streams of a reversible sequence, in floating point or in fixed point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from reformer_kernels.ops.residual import reference


class Streams(Protocol):
    """Two streams, numbered 0 and 1, updated in place."""

    tensors: tuple[Tensor, Tensor]  # their whole state

    def value(self, which: int) -> Tensor:
        """The stream as a module's input: no gradient, valid until the stream's next update."""
        ...

    def update(self, which: int, delta: Tensor, sign: int) -> None:
        """stream += sign * delta, in place."""
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


class FloatStreams:
    """Streams in their own dtype: an update is one addition, rounded (the paper's arithmetic)."""

    __slots__ = ("tensors",)

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.tensors = (first, second)

    def value(self, which: int) -> Tensor:
        return self.tensors[which]

    def update(self, which: int, delta: Tensor, sign: int) -> None:
        self.tensors[which].add_(delta, alpha=sign)

    def memory(self) -> tuple[Tensor, ...]:
        return self.tensors


class FloatKind:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def start(self, first: Tensor, second: Tensor) -> FloatStreams:
        return FloatStreams(_copied(first, self.dtype), _copied(second, self.dtype))

    def finish(self, streams: Streams, joined: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        assert isinstance(streams, FloatStreams)
        results = (torch.cat(streams.tensors, dim=-1),) if joined else streams.tensors
        return results, results

    def resume(self, saved: Sequence[Tensor]) -> FloatStreams:
        first, second = saved[0].chunk(2, dim=-1) if len(saved) == 1 else saved
        return self.start(first, second)


class FixedStreams:
    """Streams as int32 multiples of 1 / scale: subtracting undoes adding to the last bit."""

    __slots__ = ("kind", "tensors", "values")

    def __init__(self, kind: FixedKind, first: Tensor, second: Tensor) -> None:
        self.kind = kind
        self.tensors = (first, second)
        self.values: list[Tensor | None] = [None, None]

    def value(self, which: int) -> Tensor:
        value = self.values[which]
        if value is None:
            value = self.values[which] = self._step(which, None, 1)
        return value

    def update(self, which: int, delta: Tensor, sign: int) -> None:
        # The other stream's value was the input that gave `delta`; it is not read again before it changes.
        self.values[1 - which] = None
        self.values[which] = self._step(which, delta, sign)

    def memory(self) -> tuple[Tensor, ...]:
        return ()

    def _step(self, which: int, delta: Tensor | None, sign: int) -> Tensor:
        kind, stream = self.kind, self.tensors[which]
        if kind.backend != "reference":
            step = getattr(torch.ops.reformer_kernels, f"{kind.backend}_residual_step")
            value: Tensor = step(
                stream, delta, sign, kind.scale, kind.flag, kind.dtype, "none", None, None, 0.0
            )[0]
            return value
        if delta is not None:
            reference.fixed_point_add_(stream, delta, kind.scale, sign, kind.flag)
        return reference.fixed_point_decode(stream, kind.scale, kind.dtype)


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

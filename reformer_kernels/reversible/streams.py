"""The two residual streams of a reversible sequence, in floating point or in fixed point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from reformer_kernels.ops.residual import op as op  # registers the operators
from reformer_kernels.ops.residual import reference
from reformer_kernels.reversible.fused_norm import Norm, Normed, norm_arguments


class Streams(Protocol):
    """Two residual streams, 0 and 1, that are updated in place."""

    tensors: tuple[Tensor, Tensor]  # the whole state of the streams

    def value(self, index: int) -> Tensor:
        """The stream as a module's input: without gradient, and valid until the next update of the stream."""
        ...

    def update(self, index: int, delta: Tensor, sign: int, norm: Norm | None = None) -> None:
        """stream += sign * delta, in place. `norm` says what `normed` will be asked for next, if at all."""
        ...

    def normed(self, index: int, norm: Norm) -> Normed | None:
        """The normalised stream, if one of our kernels computes it; None means that the module must."""
        ...

    def shared_memory(self) -> tuple[Tensor, ...]:
        """The tensors that both updates change and `value` returns."""
        ...


class StreamFormat(Protocol):
    """How one call of a sequence holds its streams."""

    dtype: torch.dtype  # the dtype of module inputs and of results

    def start(self, first: Tensor, second: Tensor) -> Streams:
        """Streams with these values, in memory of their own."""
        ...

    def finish(self, streams: Streams, joined: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The results for the caller, and what `resume` needs.

        The results are one tensor if `joined` along the last dimension, else two. They may share memory with
        what `resume` needs, but with nothing else.
        """
        ...

    def resume(self, saved: Sequence[Tensor]) -> Streams:
        """The finished streams once more, in memory of their own."""
        ...


class _StreamPair:
    """The tensors of two streams, and their steps on the format's back end."""

    __slots__ = ("_normed", "stream_format", "tensors")

    def __init__(self, stream_format: FloatFormat | FixedPointFormat, first: Tensor, second: Tensor) -> None:
        self.stream_format = stream_format
        self.tensors = (first, second)
        self._normed: list[Normed | None] = [None, None]

    def _step(self, index: int, delta: Tensor | None, sign: int, norm: Norm | None) -> Tensor:
        """One pass of the operator over a stream; returns the value of a fixed-point stream."""
        stream_format = self.stream_format
        operator = getattr(torch.ops.reformer_kernels, f"{stream_format.backend}_residual_step")
        fixed = (
            (stream_format.scale, stream_format.flag)
            if isinstance(stream_format, FixedPointFormat)
            else (None, None)
        )
        normalization = (
            ("none", None, None, 0.0) if norm is None else norm_arguments(norm, stream_format.dtype)
        )
        value: Tensor
        value, *normed = operator(
            self.tensors[index], delta, sign, *fixed, stream_format.dtype, *normalization
        )
        self._normed[index] = None if norm is None else Normed(normalization[0], *normed)
        return value

    def normed(self, index: int, norm: Norm) -> Normed | None:
        if self.stream_format.backend == "reference":
            return None
        if self._normed[index] is None:
            self._step(index, None, 1, norm)
        normed, self._normed[index] = self._normed[index], None
        return normed


class FloatStreams(_StreamPair):
    """Streams in floating point: an update is one rounded addition (the paper's arithmetic)."""

    __slots__ = ()

    def value(self, index: int) -> Tensor:
        return self.tensors[index]

    def update(self, index: int, delta: Tensor, sign: int, norm: Norm | None = None) -> None:
        self._normed[index] = None
        if norm is None or self.stream_format.backend == "reference":
            self.tensors[index].add_(delta, alpha=sign)
        else:
            self._step(index, delta, sign, norm)

    def shared_memory(self) -> tuple[Tensor, ...]:
        return self.tensors


class FloatFormat:
    """Streams in floating point. Steps that normalise run on `backend`; others are torch's additions."""

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


class FixedPointStreams(_StreamPair):
    """Streams as int32 multiples of 1 / scale, where subtracting undoes adding to the last bit."""

    __slots__ = ("values",)
    stream_format: FixedPointFormat

    def __init__(self, stream_format: FixedPointFormat, first: Tensor, second: Tensor) -> None:
        super().__init__(stream_format, first, second)
        self.values: list[Tensor | None] = [None, None]

    def value(self, index: int) -> Tensor:
        value = self.values[index]
        if value is None:
            if self.stream_format.backend == "reference":
                value = reference.fixed_point_decode(
                    self.tensors[index], self.stream_format.scale, self.stream_format.dtype
                )
            else:
                value = self._step(index, None, 1, None)
            self.values[index] = value
        return value

    def update(self, index: int, delta: Tensor, sign: int, norm: Norm | None = None) -> None:
        # The other stream's value was the input that gave `delta`; it changes before it is read again.
        self.values = [None, None]
        if self.stream_format.backend == "reference":
            reference.fixed_point_add_(
                self.tensors[index], delta, self.stream_format.scale, sign, self.stream_format.flag
            )
        else:
            self.values[index] = self._step(index, delta, sign, norm)

    def shared_memory(self) -> tuple[Tensor, ...]:
        return ()


class FixedPointFormat:
    """Streams in fixed point.

    Args:
        dtype: the dtype of module inputs and of results.
        scale: a power of two, the steps per unit; None chooses it from the input.
        flag: int32, one element, on the streams' device; becomes 1 when a value leaves int32's range.
        backend: the back end of the steps; all give the same bits.
    """

    scale: Tensor

    def __init__(self, dtype: torch.dtype, scale: float | None, flag: Tensor, backend: str) -> None:
        self.dtype = dtype
        self.requested_scale = scale
        self.flag = flag
        self.backend = backend

    def start(self, first: Tensor, second: Tensor) -> FixedPointStreams:
        if self.requested_scale is None:
            self.scale = reference.automatic_scale(first, second)
        else:
            self.scale = torch.full((), self.requested_scale, dtype=torch.float32, device=first.device)
        return FixedPointStreams(
            self,
            reference.fixed_point_encode(first.contiguous(), self.scale, self.flag),
            reference.fixed_point_encode(second.contiguous(), self.scale, self.flag),
        )

    def finish(self, streams: Streams, joined: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        assert isinstance(streams, FixedPointStreams)
        results = (streams.value(0), streams.value(1))
        return (torch.cat(results, dim=-1),) if joined else results, streams.tensors

    def resume(self, saved: Sequence[Tensor]) -> FixedPointStreams:
        return FixedPointStreams(self, saved[0].clone(), saved[1].clone())


def _copied(values: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(values.shape, dtype=dtype, device=values.device).copy_(values)

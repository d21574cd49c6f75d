"""Reversible residual layers: activation memory that does not grow with depth.

Source: Gomez et al., "The Reversible Residual Network" (arXiv 1707.04585), as used in Kitaev et al.,
"Reformer" (arXiv 2001.04451), section 3.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from reformer_kernels._backend import Backend, resolve_backend
from reformer_kernels.reversible import graph as graph
from reformer_kernels.reversible import recomputation as _replay
from reformer_kernels.reversible.fused_norm import Normed, check_norm, normalise
from reformer_kernels.reversible.streams import FixedKind, FloatKind, Norm, StreamKind

Residual = Literal["float", "exact"]
Route = Literal["f", "g", "both"]
Streams = Tensor | tuple[Tensor, Tensor]


class _InRun:
    """Marks the call of a block by its sequence, which gives carriers in place of activations."""

    def __init__(self, run: graph.Run) -> None:
        self.run = run


class ReversibleBlock(nn.Module):
    """y1 = x1 + f(x2), y2 = x2 + g(y1).

    Args:
        f, g: modules that keep their input's shape and dtype (under autocast, a lower-precision result is
            fine). Each may return a tuple (residual, *auxiliary): auxiliary losses and the like.
        route: which of the two gets the extra arguments of the call.
        compute_dtype: cast what f and g get to this dtype, as for modules in bfloat16 on float32 streams
            (FSDP2's `MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)`, say).
            None: no cast.
        norm_f, norm_g: nn.LayerNorm or nn.RMSNorm over the last dimension, or None: f(norm_f(x2)),
            g(norm_g(y1)). Equal to having them inside f and g, but in a reversible sequence the residual step
            that writes a stream normalises it in the same pass (native back end), without calling the norm's
            module.

    Called by itself, a block runs ordinarily: block(x1, x2, ...) -> (y1, y2, *auxiliary of f, *auxiliary of
    g). With FSDP2, a block is the unit: `fully_shard(block)`, not `fully_shard(block.f)`.
    """

    def __init__(
        self,
        f: nn.Module,
        g: nn.Module,
        *,
        route: Route = "f",
        compute_dtype: torch.dtype | None = None,
        norm_f: nn.Module | None = None,
        norm_g: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_norm("norm_f", norm_f)
        check_norm("norm_g", norm_g)
        for name, module in (("f", f), ("g", g)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be an nn.Module, got {type(module).__name__}")
        if route not in get_args(Route):
            raise ValueError(f"route must be one of {get_args(Route)}, got {route!r}")
        self.f = f
        self.g = g
        self.route = route
        self.compute_dtype = compute_dtype
        self.norm_f = norm_f
        self.norm_g = norm_g

    def norm_of(self, name: str) -> Norm | None:
        """What normalises the input of f or g (`name`)."""
        norm = self.norm_f if name == "f" else self.norm_g
        return cast("Norm | None", norm)  # as checked when the block was made

    def norm_after(self, name: str, sign: int) -> Norm | None:
        """What normalises the stream that `name` has just changed for the block's next part, if there is one.

        Forward (sign 1) f comes first, in backward (-1) g.
        """
        if name != ("f" if sign > 0 else "g"):
            return None
        return self.norm_of("g" if sign > 0 else "f")

    def call_part(
        self,
        name: str,
        value: Tensor,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        normed: Normed | None = None,
    ) -> tuple[Any, tuple[Any, ...]]:
        """f or g (`name`) on `value`, with the extra arguments if they are routed to it: (residual,
        auxiliary)."""
        module = self.f if name == "f" else self.g
        norm = self.norm_of(name)
        if norm is not None:
            value = normalise(value, norm, normed)
        if self.compute_dtype is not None:
            value = value.to(self.compute_dtype)
        result = module(value, *args, **kwargs) if self.route in (name, "both") else module(value)
        if isinstance(result, tuple) and result:
            return result[0], tuple(result[1:])
        return result, ()

    def forward(self, x1: Tensor, x2: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], _InRun):
            return self._step(args[0].run, x1, x2, args[1:], kwargs)
        residual, auxiliary_f = self.call_part("f", x2, args, kwargs)
        y1 = x1 + residual
        residual, auxiliary_g = self.call_part("g", y1, args, kwargs)
        return y1, x2 + residual, *auxiliary_f, *auxiliary_g

    def _step(
        self, run: graph.Run, first: Tensor, second: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        for carrier in (first, second):
            if not graph.is_carrier(carrier) or carrier.dtype != run.kind.dtype:
                raise RuntimeError(
                    f"block {len(run.auxiliary)} got an input that something changed on the way from the "
                    f"sequence (dtype {carrier.dtype}, expected {run.kind.dtype}). With FSDP2 mixed "
                    "precision, use MixedPrecisionPolicy(..., cast_forward_inputs=False) on blocks; with "
                    "hooks, leave inputs alone"
                )
        structure, constants, arguments = graph.take_tensors((tuple(args), dict(kwargs)))
        parameters = _replay.Parameters(self)
        result: tuple[Tensor, ...] = graph.Step.apply(
            run,
            self,
            parameters,
            graph.ArgumentSpec(structure, constants),
            len(arguments),
            first,
            second,
            *arguments,
            *parameters.distinct,
        )
        return result


class ReversibleSequence(nn.Module):
    """Blocks y1 = x1 + f(x2), y2 = x2 + g(y1) one after another, at the activation memory of one.

    The streams are updated in place; the backward pass rebuilds each block's input from its output and runs
    the block again. Gradients reach inputs, parameters and extra arguments through the ordinary autograd
    graph, one node a block: hooks, `torch.autograd.grad`, `retain_graph`, DistributedDataParallel,
    `torch.utils.checkpoint` and FSDP2 (`fully_shard` on blocks, with `cast_forward_inputs=False` if it has a
    mixed-precision policy) see what they see of other modules. Kept for each block: the random-number state
    before f and before g, autocast's settings, and references to the arguments.

    Args:
        blocks: (f, g) pairs of modules, or `ReversibleBlock`s.
        residual: "float": streams in the input's dtype (float32 under autocast); a rebuilt activation differs
            from the first one by rounding, which grows with depth. "exact": streams in fixed point (int32),
            where a rebuilt activation equals the first to the last bit.
        scale: for "exact": a power of two, the streams' steps per unit; values must stay below 2**31 / scale.
            None: chosen in each call from the input, so that streams may grow to 256 times its largest value,
            or 256 if that is below 1.
        route, compute_dtype: of the blocks that are given as pairs: see `ReversibleBlock`.
        preserve_random_state: recompute with the random numbers of the first run (dropout needs it).
        keep_layouts: keep what modules choose through `remember` (LSH attention's layouts), so that rounding
            in a rebuilt activation cannot flip a hash. Float mode only: exact mode has no rounding.
        backend: of the steps in exact mode and of those that normalise: "auto", "native" (CPU) or
            "reference". Fixed-point steps give the same bits in all.

    Shapes:
        x: (..., 2 d), two streams side by side, or a pair of tensors of one shape. The result has the same
        form. Extra arguments may be anything; tensors among them (also within tuples, lists and dicts) get
        gradients.

    Returns the streams; if some f or g returned a tuple, (streams, auxiliary): for each block, the tuple of
    what its f and its g returned after the residual.

    Raises:
        TypeError, ValueError: input or blocks of the wrong kind or shape.
        RuntimeError: a block changed its input in place, or uses a tensor from outside whose gradient would
            be lost; a parameter changed between forward and backward; a second derivative is asked for.
        FloatingPointError: "exact": values of an earlier step left the representable range (see `check`).

    Example:
        >>> block = lambda: (nn.Linear(8, 8), nn.Linear(8, 8))
        >>> layers = ReversibleSequence([block() for _ in range(3)])
        >>> layers(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        blocks: Iterable[Any],
        *,
        residual: Residual = "float",
        scale: float | None = None,
        route: Route = "f",
        compute_dtype: torch.dtype | None = None,
        preserve_random_state: bool = True,
        keep_layouts: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if residual not in get_args(Residual):
            raise ValueError(f"residual must be one of {get_args(Residual)}, got {residual!r}")
        if scale is not None:
            if residual != "exact":
                raise ValueError('scale belongs to residual="exact"; leave it out with residual="float"')
            if not scale > 0 or math.frexp(scale)[0] != 0.5 or not 2.0**-60 <= scale <= 2.0**60:
                raise ValueError(f"scale must be a power of two from 2**-60 to 2**60, got {scale}")
        if backend not in get_args(Backend):
            raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
        if keep_layouts and residual == "exact":
            raise ValueError(
                'keep_layouts is for residual="float": exact streams rebuild layouts bit for bit'
            )
        self.blocks = nn.ModuleList(
            _as_block(block, number, route, compute_dtype) for number, block in enumerate(blocks)
        )
        self.residual = residual
        self.scale = scale
        self.preserve_random_state = preserve_random_state
        self.keep_layouts = keep_layouts
        self.backend = backend
        # Not buffers: DistributedDataParallel would overwrite each process's flag with the first one's.
        self._flags: dict[torch.device, Tensor] = {}

    def extra_repr(self) -> str:
        return f"residual={self.residual!r}" + ("" if self.scale is None else f", scale={self.scale}")

    @torch.compiler.disable(recursive=False)
    def forward(self, x: Streams, *args: Any, **kwargs: Any) -> Any:
        first, second, joined = _two_streams(x)
        self._refuse_sharded_parts()
        run = graph.Run(
            self._stream_kind(first),
            preserve_random_state=self.preserve_random_state,
            keep_layouts=self.keep_layouts,
        )
        first, second = graph.Enter.apply(run, first, second)
        auxiliary = []
        for block in self.blocks:
            first, second, *extra = block(first, second, _InRun(run), *args, **kwargs)
            auxiliary.append(graph.fill_tensors(*run.auxiliary[-1], extra))
        results = graph.Leave.apply(run, joined, first, second)
        return _with_auxiliary(results[0] if joined else results, auxiliary)

    def plain(self, x: Streams, *args: Any, **kwargs: Any) -> Any:
        """The same blocks in floating point with autograd's own graph: memory grows with depth.

        For comparison, and where second derivatives are needed. Same arguments and results as the call.
        """
        first, second, joined = _two_streams(x)
        dtype = _stream_dtype(first)
        first, second = first.to(dtype), second.to(dtype)
        auxiliary = []
        for block in self.blocks:
            first, second, *extra = block(first, second, *args, **kwargs)
            auxiliary.append(tuple(extra))
        return _with_auxiliary(torch.cat((first, second), dim=-1) if joined else (first, second), auxiliary)

    def check(self) -> None:
        """Raises FloatingPointError if, in exact mode, a value since the last check left the range or was not
        finite. Waits for the device. Each call of the sequence checks the steps before it in the same way."""
        for device, flag in self._flags.items():
            if flag.item():
                flag.zero_()
                raise FloatingPointError(
                    f'residual="exact": a value on {device} was not finite or left the range of the '
                    "fixed-point "
                    "streams in an earlier step, whose results are wrong. The range is 2**31 / scale: "
                    + (
                        "256 times the larger of 1 and the largest input, as scale is automatic; give a "
                        "smaller scale"
                        if self.scale is None
                        else f"{2.0**31 / self.scale:g}, as scale is {self.scale:g}; give a smaller one"
                    )
                )

    def _stream_kind(self, first: Tensor) -> StreamKind:
        dtype = _stream_dtype(first)
        if self.residual == "float":
            fuses = any(block.norm_f is not None or block.norm_g is not None for block in self.blocks)
            return FloatKind(
                dtype, resolve_backend(self.backend, first.device, dtype) if fuses else "reference"
            )
        self.check()
        flag = self._flags.get(first.device)
        if flag is None:
            flag = self._flags[first.device] = torch.zeros(1, dtype=torch.int32, device=first.device)
        return FixedKind(dtype, self.scale, flag, resolve_backend(self.backend, first.device, dtype))

    def _refuse_sharded_parts(self) -> None:
        fsdp = sys.modules.get("torch.distributed.fsdp")
        sharded = getattr(fsdp, "FSDPModule", None)
        if sharded is None:
            return
        for number, block in enumerate(self.blocks):
            for name, module in block.named_modules():
                if name and isinstance(module, sharded):
                    raise RuntimeError(
                        f"fully_shard was applied to {name!r} within block {number}: its gradients would be "
                        "lost, as the block runs its parts again on its own. Apply fully_shard to the block"
                    )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_flags": {}}


def _as_block(block: Any, number: int, route: Route, compute_dtype: torch.dtype | None) -> ReversibleBlock:
    if isinstance(block, ReversibleBlock):
        return block
    if isinstance(block, tuple | list | nn.ModuleList | nn.Sequential) and len(block) == 2:
        return ReversibleBlock(block[0], block[1], route=route, compute_dtype=compute_dtype)
    size = f" of length {len(block)}" if hasattr(block, "__len__") else ""
    raise TypeError(
        f"block {number} must be a pair of modules (f, g) or a ReversibleBlock, got "
        f"{type(block).__name__}{size}"
    )


def _two_streams(x: Any) -> tuple[Tensor, Tensor, bool]:
    """The streams, and whether they came side by side in one tensor."""
    if isinstance(x, Tensor):
        if x.dim() == 0 or x.shape[-1] % 2 or x.shape[-1] == 0:
            raise ValueError(
                "the input's last dimension must be even, to split into two streams, got shape "
                f"{tuple(x.shape)}; or pass a pair of tensors (x1, x2)"
            )
        first, second = x.chunk(2, dim=-1)
    elif isinstance(x, tuple | list) and len(x) == 2 and all(isinstance(item, Tensor) for item in x):
        first, second = x
        if first.shape != second.shape:
            raise ValueError(
                f"the two streams must have one shape, got {tuple(x[0].shape)} and {tuple(x[1].shape)}"
            )
        if first.dtype != second.dtype or first.device != second.device:
            raise ValueError(
                f"the two streams must agree in dtype and device, got {first.dtype} on {first.device} and "
                f"{second.dtype} on {second.device}"
            )
    else:
        raise TypeError(f"the input must be a tensor (..., 2 d) or a pair of tensors, got {type(x).__name__}")
    if not first.is_floating_point():
        raise TypeError(f"the streams must be floating point, got {first.dtype}")
    return first, second, isinstance(x, Tensor)


def _stream_dtype(stream: Tensor) -> torch.dtype:
    """The input's dtype, but never below float32 under autocast: sums of many residuals need the
    precision."""
    autocast = _replay.AutocastState(stream.device).enabled
    return torch.float32 if autocast and stream.dtype.itemsize < 4 else stream.dtype


def _with_auxiliary(streams: Streams, auxiliary: list[tuple[Any, ...]]) -> Any:
    return (streams, auxiliary) if any(auxiliary) else streams
